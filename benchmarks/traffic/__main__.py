"""``python -m benchmarks.traffic``: the counts of every Florenz model, as tables and a file.

A decoder layer in training and in decoding, and a whole decoding step; transformers eager,
torch.compile, Liger and fastvlm. A side that cannot be counted here says why.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastvlm.env
from benchmarks.cases import DECODERS, Decoder
from benchmarks.traffic import compiled, counter, inputs, layers, liger, no_device, steps, tables
from benchmarks.traffic.inputs import Decoding, Training, Work
from fastvlm.florenz import FlorenzConfig
from fastvlm.florenz.sizes import SIZES
from fastvlm.tables import text_table

Record = dict[str, Any]
RESULTS = Path(__file__).resolve().parent.parent / "results" / "traffic.json"
# arXiv 2503.09443: 32 targets of a micro-batch, 46.9 tokens on average of at most 128, beside an
# image of 50 tokens (224 px) with 39.1 tokens of prompt on average, padded to 178
BATCH, LONGEST, MEAN, IMAGE, PROMPT, MOST = 32, 128, 46.9, 50, 39.1, 178
STEP = Decoding(images=8, beams=4, keys=594, filled=64)
BACKENDS = {tables.TRITON: ("triton",), tables.CUDA: ("cuda", "triton")}


def _lengths(mean: float, most: int) -> list[int]:
    """32 numbers up to most, of about this mean; the longest is most itself."""
    draw = random.Random(0)
    drawn = [min(most, max(4, round(draw.expovariate(1 / mean)))) for _ in range(BATCH - 1)]
    return [most, *drawn]


def training() -> Training:
    keys = (IMAGE + n for n in _lengths(PROMPT, MOST - IMAGE))
    return Training(tuple(_lengths(MEAN, LONGEST)), tuple(keys), LONGEST, MOST)


def _kind(work: Work) -> str:
    return "training" if isinstance(work, Training) else "decoding"


def count_layer(d: Decoder, side: str, work: Work) -> Record:
    """Launches and bytes of one layer: forward, backward (in training); not of torch.compile."""
    record: Record = {"model": d.name, "kind": _kind(work), "side": side}
    with contextlib.ExitStack() as stack:
        stack.enter_context(counter.as_on_cuda())
        if side == "Liger":
            if reason := liger.missing():
                return {**record, "missing": reason}
            stack.enter_context(liger.applied())
        with torch.device(counter.DEVICE):
            layer = layers.layer_of(d)
            layer = liger.with_layer_norms(layer) if side == "Liger" else layer
        layer.bfloat16()
        forward, backward = counter.Traffic(), counter.Traffic()
        if side == tables.OURS:
            run = partial(layer.fastvlm, inputs.packed(d, work))
        else:
            run = partial(layer.transformers, inputs.padded(d, work))
        if isinstance(work, Decoding):
            layer.eval().requires_grad_(False)
            with torch.no_grad():
                _counted(forward, run)
            return {**record, "forward": forward.numbers()}
        outs = _counted(forward, run)
        outs = outs if isinstance(outs, tuple) else (outs,)
        grads = [torch.empty_like(o) for o in outs]
        _counted(backward, lambda: torch.autograd.backward(outs, grads))
    return {**record, "forward": forward.numbers(), "backward": backward.numbers()}


def _counted(traffic: counter.Traffic, run: Callable[[], Any]) -> Any:
    with counter.triton_launches(traffic, "liger."), traffic:
        return run()


def count_step(name: str, config: FlorenzConfig, side: str, work: Decoding) -> Record:
    """A whole step by its parts; not of torch.compile."""
    ours = side in BACKENDS
    backends = BACKENDS.get(side, ())
    model = steps.model_of(config)
    if ours:
        steps.patched(model)
    x = steps.inputs_of(config, work, 1 if ours else work.beams, counter.DEVICE)
    record: Record = {"model": name, "side": side}
    with torch.no_grad(), counter.as_on_cuda(), steps.known_lengths():

        def part(name: str, run: Callable[[], Any]) -> Any:
            with counter.Traffic(backends) as traffic:
                result = run()
            record[name] = traffic.numbers()
            return result

        if ours:
            with counter.Traffic(backends):
                steps.prefill(model, x, work)
        else:
            steps.fill_caches(model, x, work)
        h = part("stack", lambda: steps.states(model, x))
        if ours:  # a loop's first step is over
            with counter.Traffic(backends):
                steps.ranked(model, h, x.scores)
        head = steps.ranked if ours else steps.head
        part("head", lambda: head(model, h, x.scores))
        part("reorder", lambda: steps.reorder(x))
    return record


def count_compiled(places: Sequence[Record], jobs: Sequence[compiled.Job]) -> list[Record]:
    """torch.compile's records; places: model and kind of each job."""
    side = {"side": compiled.SIDE}
    if reason := no_device.missing():
        return [{**place, **side, "missing": reason} for place in places]
    return [{**place, **side, **found} for place, found in zip(places, compiled.count(jobs))]


def count_layers(
    decoders: Sequence[Decoder], works: Sequence[Work], sides: Sequence[str]
) -> list[Record]:
    cases = [(d, work) for d in decoders for work in works]
    found = [
        count_layer(d, side, work) for d, work in cases for side in sides if side != compiled.SIDE
    ]
    if compiled.SIDE in sides:
        places: list[Record] = [{"model": d.name, "kind": _kind(work)} for d, work in cases]
        found += count_compiled(places, [compiled.layer_job(d, work) for d, work in cases])
    return found


def count_steps(
    configs: dict[str, FlorenzConfig], work: Decoding, sides: Sequence[str]
) -> list[Record]:
    found = [
        count_step(name, config, side, work)
        for name, config in configs.items()
        for side in sides
        if side != compiled.SIDE
    ]
    if compiled.SIDE in sides:
        jobs = [compiled.step_job(config, work) for config in configs.values()]
        found += count_compiled([{"model": name} for name in configs], jobs)
    return found


def kept(path: Path, figures: Record) -> Record:
    """figures, and from the file what was not counted now: ValueError where it is of other versions
    or of another step."""
    before = json.loads(path.read_text()) if path.exists() else figures
    for name in ("versions", "step"):
        if before[name] != figures[name]:
            raise ValueError(f"{path}: its {name} are others ({before[name]}): count all sides")
    models = [*(d.name for d in DECODERS), *SIZES]
    sides = [*tables.LAYER_SIDES, *tables.STEP_SIDES]

    def place(r: Record) -> tuple[Any, ...]:
        return models.index(r["model"]), r.get("kind") != "training", sides.index(r["side"])

    merged = dict(figures)
    for part in ("counted", "steps"):
        records = {place(r): r for r in (*before[part], *figures[part])}
        merged[part] = [records[key] for key in sorted(records)]
    return merged


def kernels(records: Sequence[Record]) -> str:
    """Every kernel's share."""
    lines = []
    for r in records:
        for part in (*tables.PARTS, "stack", "head", "reorder"):
            for name, (n, moved) in r.get(part, {"kernels": {}})["kernels"].items():
                where = " ".join(r[key] for key in ("model", "kind") if key in r)
                lines.append((where, r["side"], part, name, str(n), f"{moved / 2**20:.1f}"))
    return text_table(("of", "side", "part", "kernel", "launches", "MiB"), lines)


def main(argv: Sequence[str] | None = None) -> None:
    every = list(dict.fromkeys((*tables.LAYER_SIDES, *tables.STEP_SIDES)))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--kernels", action="store_true", help="print every kernel's share")
    only = "count these alone; the file keeps its other counts"
    parser.add_argument("--size", nargs="+", default=list(SIZES), choices=list(SIZES), help=only)
    parser.add_argument("--side", nargs="+", default=every, choices=every, help=only)
    args = parser.parse_args(argv)
    decoders = [d for d, size in zip(DECODERS, SIZES) if size in args.size]
    sides = [[s for s in of if s in args.side] for of in (tables.LAYER_SIDES, tables.STEP_SIDES)]
    configs = {size: FlorenzConfig.of_size(size) for size in args.size}
    figures = {
        "versions": {**fastvlm.env.versions(), "liger": liger.version()},
        "step": asdict(STEP),
        "counted": count_layers(decoders, (training(), STEP), sides[0]),
        "steps": count_steps(configs, STEP, sides[1]),
    }
    if args.size != list(SIZES) or args.side != every:
        figures = kept(args.out, figures)
    print(text_table(tables.LAYER_HEADERS, tables.layer_rows(figures["counted"])), end="\n\n")
    print(text_table(tables.STEP_HEADERS, tables.step_rows(figures["steps"])), end="\n\n")
    print(text_table(tables.AROUND_HEADERS, tables.around_rows(figures["steps"])))
    if args.kernels:
        print(kernels([*figures["counted"], *figures["steps"]]))
    for note in tables.notes(figures):
        print(note)
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
