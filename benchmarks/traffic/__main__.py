"""``python -m benchmarks.traffic``: the counts of every Florenz model, as a table and a file."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import DECODERS, Decoder
from benchmarks.traffic import counter, layers
from fastvlm.env import versions
from fastvlm.tables import text_table

RESULTS = Path(__file__).resolve().parent.parent / "results" / "traffic.json"
# arXiv 2503.09443: 32 targets of a micro-batch, 46.9 tokens on average of at most 128, beside an
# image of 50 tokens (224 px) with 39.1 tokens of prompt on average, padded to 178
BATCH, LONGEST, MEAN, IMAGE, PROMPT, MOST = 32, 128, 46.9, 50, 39.1, 178
IMAGES, BEAMS, KEYS, FILLED = 8, 4, 594, 64


def _lengths(mean: float, most: int) -> list[int]:
    """32 numbers up to most, of about this mean; the longest is most itself."""
    draw = random.Random(0)
    drawn = [min(most, max(4, round(draw.expovariate(1 / mean)))) for _ in range(BATCH - 1)]
    return [most, *drawn]


def count(d: Decoder, side: str, kind: str) -> dict[str, Any]:
    """Launches and bytes of one layer: forward, backward (in training)."""
    with counter.as_on_cuda():
        with torch.device(counter.DEVICE):
            layer = layers.layer_of(d).bfloat16()
        if kind == "training":
            lengths = _lengths(MEAN, LONGEST)
            keys = [IMAGE + n for n in _lengths(PROMPT, MOST - IMAGE)]
            inputs = layers.training(d, lengths, keys, LONGEST, MOST)
        else:
            layer.eval().requires_grad_(False)
            inputs = layers.decoding(d, IMAGES, BEAMS, KEYS, FILLED)
        run = getattr(layer, side)
        forward, backward = counter.Traffic(), counter.Traffic()
        if kind == "decoding":
            with torch.no_grad(), forward:
                run(inputs)
        else:
            with forward:
                outs = run(inputs)
            outs = outs if isinstance(outs, tuple) else (outs,)
            grads = [torch.empty_like(o) for o in outs]
            with backward:
                torch.autograd.backward(outs, grads)
        return {
            "model": d.name,
            "kind": kind,
            "side": side,
            **_numbers("forward", forward),
            **(_numbers("backward", backward) if kind == "training" else {}),
        }


def _numbers(name: str, traffic: counter.Traffic) -> dict[str, Any]:
    launches, moved = traffic.total
    by_kernel = {k: [n, traffic.moved[k]] for k, n in sorted(traffic.launches.items())}
    return {name: {"launches": launches, "bytes": moved, "kernels": by_kernel}}


def rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line for each model and kind of step: transformers against fastvlm."""
    found = {(r["model"], r["kind"], r["side"]): r for r in results}
    lines = []
    for model, kind, side in found:
        if side != "fastvlm":
            continue
        for part in ("forward", "backward"):
            ours = found[model, kind, "fastvlm"].get(part)
            theirs = found[model, kind, "transformers"].get(part)
            if ours is None or theirs is None:
                continue
            lines.append(
                (
                    model,
                    f"{kind}, {part}" if kind == "training" else kind,
                    f"{theirs['launches']}",
                    f"{ours['launches']}",
                    f"{theirs['bytes'] / 2**20:.0f}",
                    f"{ours['bytes'] / 2**20:.0f}",
                )
            )
    return lines


HEADER = (
    "decoder layer", "step", "launches, transformers", "launches, fastvlm",
    "MiB, transformers", "MiB, fastvlm",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--kernels", action="store_true", help="print every kernel's share")
    args = parser.parse_args()
    results = [
        count(d, side, kind)
        for d in DECODERS
        for kind in ("training", "decoding")
        for side in ("transformers", "fastvlm")
    ]
    print(text_table(HEADER, rows(results)))
    if args.kernels:
        for r in results:
            for part in ("forward", "backward"):
                for name, (n, moved) in r.get(part, {"kernels": {}})["kernels"].items():
                    print(f"{r['model']:16} {r['kind']:9} {part:9} {r['side']:13}", end="")
                    print(f"{name:36} {n:4} {moved / 2**20:10.1f} MiB")
    args.out.write_text(json.dumps({"versions": versions(), "counted": results}, indent=1) + "\n")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
