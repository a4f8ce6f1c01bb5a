"""Florence-2-base captions a photo, greedy and with beams, through transformers and patched, with
the model's own weights and with weights in fewer bits.

The demo's own mechanism (`benchmarks.demo.compare`): true shapes, random weights, interleaved runs
in one process, tokens compared. ``python -m benchmarks.end_to_end --help``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.demo.compare import SIDES, compare
from benchmarks.demo.workload import random_workload
from fastvlm import env
from fastvlm.loading.random_florence2 import load_photo
from fastvlm.tables import text_table

RESULTS = Path(__file__).resolve().parent / "results"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 3], help="default 1 3")
    parser.add_argument("--new-tokens", type=int, default=64, help="default 64")
    parser.add_argument(
        "--weights",
        nargs="*",
        default=["bf16", "int8"],
        choices=("bf16", "int8"),
        help="also with weights in so many bits, at the most beams (default: both)",
    )
    parser.add_argument(
        "--large-beams", type=int, nargs="*", default=[4], help="of Florence-2-large, default 4"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("--small", action="store_true", help="a tiny model, for testing")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    load = env.load_average()
    photo, name = load_photo(None)
    cases = []
    runs = [(beams, None, False) for beams in args.beams]
    runs += [(max(args.beams), weights, False) for weights in args.weights]
    runs += [(beams, None, True) for beams in args.large_beams]
    for beams, weights, large in runs:
        label = f"{'large, ' if large else ''}{beams} beams"
        label += f", weights {weights}" if weights else ""
        workload = random_workload(
            photo,
            beams=beams,
            new_tokens=args.new_tokens,
            tiny=args.small,
            large=large,
            device=args.device,
        )
        result = compare(
            workload,
            rounds=args.rounds,
            weights=weights,
            progress=lambda line, name=label: print(  # type: ignore[misc]
                f"{name}: {line}", file=sys.stderr, flush=True
            ),
        )
        print(f"\n{workload.facts['model']}, {label}\n")
        print(text_table(("", *SIDES, "ratio"), result.rows()))
        if result.change is not None:
            print(f"\n{result.change}")
        facts = {**workload.facts, "image": name, "beams": beams, "new_tokens": args.new_tokens}
        # a step is as fast as the memory, and that of a virtual machine changes with its neighbours
        bandwidth = round(measure.stream_bandwidth(args.device) / 1e9, 2)
        measure.release_stream()
        cases.append({"workload": facts, "stream_gb_per_s": bandwidth, **result.figures()})
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"end_to_end-{args.device}{'-small' if args.small else ''}.json"
    head = {
        **env.stamp(),
        "device": args.device,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "load_average_before": load,
    }
    path.write_text(json.dumps({**head, "cases": cases}, indent=1) + "\n")
    print(f"\nwritten: {path}")
    exact = [case for case in cases if case["weights"] is None]
    return 0 if all(case["identical_tokens"] for case in exact) else 1


if __name__ == "__main__":
    sys.exit(main())
