"""``python -m benchmarks.decoding_engines``: a decoding step beside ONNX Runtime's and OpenVINO's.

Florence-2-base at its true shapes, one 768 px photo, 3 beams, 64 tokens. One loop drives all sides,
transformers' generate(): transformers itself (sdpa), each engine in several forms of which the
fastest counts, and fastvlm with float32 and with bfloat16 weights. One process, interleaved,
medians over rounds; a step is a long caption's time less a short one's, so what is done once for an
image is not in it. Tokens are compared: a float32 side with other tokens than transformers' is no
result.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastvlm
from benchmarks import decoder_engines, engines, measure, steps
from benchmarks.decoder_graph import KINDS, OPERATOR, PRODUCTS
from benchmarks.steps import Captioning
from benchmarks.targets import STEP_AGAINST_ENGINES
from fastvlm import env
from fastvlm.tables import text_table

RESULTS = Path(__file__).resolve().parent / "results" / "decoding-engines-cpu.json"
FLOAT32 = "float32"
# the forms of the engines' decoder that are measured; --all adds the one that was slower in both,
# and int8 (memory: 6 and 10 GB)
USUAL = (PRODUCTS, OPERATOR)

Figures = dict[str, Any]


def _same_parameters(model: Any) -> Any:
    """A model of its own, to be patched alone, over the same tensors."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def sides(captioning: Captioning, everything: bool) -> dict[str, tuple[Captioning, str]]:
    """Each side by its name, with the weights that it reads."""
    model = captioning.model
    found = {"transformers": (captioning, FLOAT32)}

    def engine(name: str, weights: str, make: Callable[..., Any], kind: str, **how: Any) -> None:
        decoder, rows = model.model.language_model.decoder, steps.BEAMS
        session = make(decoder, model.lm_head, kind, rows, captioning.states.shape[1], **how)
        found[name] = captioning.by(decoder_engines.EngineModel(model, session)), weights

    classes = {"onnxruntime": decoder_engines.OnnxRuntime, "openvino": decoder_engines.OpenVino}
    for name in filter(engines.available, classes):
        for kind in KINDS if everything else USUAL:
            engine(f"{name}, {kind}", FLOAT32, classes[name], kind)
    if engines.available("openvino"):
        name = "openvino, bf16 arithmetic"
        engine(name, "bf16", decoder_engines.OpenVino, OPERATOR, precision="bf16")
    if everything and engines.available("onnxruntime"):
        name = "onnxruntime, int8 arithmetic"
        engine(name, "int8", decoder_engines.OnnxRuntime, OPERATOR, int8=True)
    ours_in = {"fastvlm": None, "fastvlm, bf16": "bf16"}
    if everything:
        ours_in["fastvlm, int8"] = "int8"
    for name, weights in ours_in.items():
        ours = _same_parameters(model)
        fastvlm.patch(ours, weights=weights)
        found[name] = captioning.by(ours), weights or FLOAT32
    return found


def measured(found: dict[str, tuple[Captioning, str]], rounds: int) -> Figures:
    """Milliseconds a step of each side, and whether its tokens are transformers'."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for side, _ in found.values():
        side(steps.SHORT)
    for _ in range(rounds):
        for name, (side, _) in found.items():
            seconds[name].append(side.step())
    expected = found["transformers"][0].tokens
    assert expected is not None
    return {
        name: {
            "weights": weights,
            "ms": round(1e3 * statistics.median(seconds[name]), 3),
            "rounds_ms": [round(1e3 * value, 3) for value in seconds[name]],
            "identical_tokens": torch.equal(side.tokens, expected),
        }
        for name, (side, weights) in found.items()
    }


def compared(figures: Figures) -> Figures:
    """The fastest right side of an engine with float32 weights, and how fastvlm stands to it."""
    right = {
        name: side["ms"]
        for name, side in figures.items()
        if name.startswith(tuple(engines.PACKAGES))
        and side["weights"] == FLOAT32
        and side["identical_tokens"]
    }
    if not right:
        return {"fastest_engine": None, "ratio": {}}
    fastest = min(right, key=lambda name: right[name])
    ours = {name: side["ms"] for name, side in figures.items() if name.startswith("fastvlm")}
    ratio = {name: round(right[fastest] / value, 3) for name, value in ours.items()}
    return {"fastest_engine": fastest, "ratio": ratio}


def table(figures: Figures) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers and rows: every side, and fastvlm's against the fastest engine."""
    rows = []
    for name, side in figures["sides"].items():
        ratio = figures["ratio"].get(name)
        least = STEP_AGAINST_ENGINES.get(name)
        verdict = ""
        if ratio is not None and least is not None:
            verdict = f"at least {least:g}x: {'met' if ratio >= least else 'NOT MET'}"
        rows.append((
            name + (" (fastest engine)" if name == figures["fastest_engine"] else ""),
            side["weights"],
            f"{side['ms']:.1f}",
            f"{min(side['rounds_ms']):.1f} to {max(side['rounds_ms']):.1f}",
            "yes" if side["identical_tokens"] else "NO" if side["weights"] == FLOAT32 else "no",
            "" if ratio is None else f"{ratio:.2f}x",
            verdict,
        ))  # fmt: skip
    headers = (
        "side", "weights", "ms a step", "rounds", "transformers' tokens",
        "against the fastest engine", "target",
    )  # fmt: skip
    return headers, rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding_engines")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--all", action="store_true", help="every form of the engines' decoder, and int8"
    )
    parser.add_argument("--small", action="store_true", help="a tiny model, for testing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    load = env.load_average()
    captioning = steps.random_captioning(args.small)
    bandwidth = measure.stream_bandwidth("cpu")
    measure.release_stream()
    found = sides(captioning, args.all)
    figures = measured(found, args.rounds)
    size = steps.step_weights(captioning.model)
    stamp = env.stamp()
    stamp["versions"] |= engines.versions()
    page = {
        **stamp,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "load_average_before": load,
        "case": f"a step of {'a tiny Florence-2' if args.small else 'Florence-2-base, 768 px'}, "
        f"{steps.BEAMS} beams, {steps.LONG} tokens less {steps.SHORT}",
        "rounds": args.rounds,
        "weight_bytes": size,
        "stream_gb_per_s": round(bandwidth / 1e9, 2),
        "floor_ms": round(1e3 * size / bandwidth, 3),
        "settings": decoder_engines.SETTINGS,
        "missing_baselines": dict(measure.MISSING),
        "sides": figures,
        **compared(figures),
    }  # fmt: skip
    print(f"{page['case']}; floor {page['floor_ms']} ms\n")
    print(text_table(*table(page)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(page, indent=1) + "\n")
    print(f"\nwritten: {args.out}")
    exact = [side["identical_tokens"] for side in figures.values() if side["weights"] == FLOAT32]
    return 0 if all(exact) else 1


if __name__ == "__main__":
    sys.exit(main())
