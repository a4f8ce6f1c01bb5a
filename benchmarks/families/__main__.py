"""``python -m benchmarks.families``: the models of `shapes.py` beside transformers, CTranslate2.

One process, sides in turns, medians; tokens compared with transformers'. A step is a long call's
time less a short one's. What was measured before and is not asked for now stays in the file.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.families import translator
from benchmarks.families.work import BASE, OURS, WORKS, Side, Work
from fastvlm import env
from fastvlm.tables import text_table

RESULTS = Path(__file__).resolve().parents[1] / "results" / "families-cpu.json"
ROUNDS = 5
Figures = dict[str, Any]


def seconds_of(side: Side, tokens: tuple[int, int]) -> tuple[float, Any]:
    """Seconds of a step, or of a whole call; and what the long call gave."""
    short, long = tokens
    taken = []
    found = None
    for count in dict.fromkeys(tokens):
        begin = time.perf_counter()
        found = side(count)
        taken.append(time.perf_counter() - begin)
    return (taken[1] - taken[0]) / (long - short) if long > short else taken[0], found


def measured(work: Work, tiny: bool, rounds: int) -> Figures:
    made = work.make(tiny)
    sides = made.sides
    tokens = work.tokens
    if tiny:
        tokens = (3, 6 if tokens[0] < tokens[1] else 3)
    for side in sides.values():
        side(tokens[1])
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results = {}
    for _ in range(rounds):
        for name, side in sides.items():
            taken, results[name] = seconds_of(side, tokens)
            seconds[name].append(taken)
    bandwidth = measure.stream_bandwidth("cpu")
    measure.release_stream()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    others = [name for name in medians if name != OURS]
    figures = {
        "case": work.name,
        "tokens": list(tokens),
        "seconds": {name: [round(s, 6) for s in values] for name, values in seconds.items()},
        "median": {name: round(value, 6) for name, value in medians.items()},
        "ratio": {name: round(medians[name] / medians[OURS], 3) for name in others},
        "least": work.least,
        "stream_gb_per_s": round(bandwidth / 1e9, 2),
        "floor": made.step_bytes and round(made.step_bytes / bandwidth, 6),
    }
    expected = results[BASE]
    if expected.is_floating_point():
        # dropout draws differently on either side
        return {**figures, "loss": {name: float(value) for name, value in results.items()}}
    equal = {
        name: value.shape == expected.shape and bool((value == expected).all())
        for name, value in results.items()
    }
    return {**figures, "different_tokens": len(expected.unique()), "identical_tokens": equal}


def table(cases: list[Figures]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = []
    for case in cases:
        for name, ratio in case["ratio"].items():
            least = case["least"].get(name)
            low, high = (f(case["seconds"][OURS]) for f in (min, max))
            rows.append((
                case["case"], name,
                f"{1e3 * case['median'][name]:.1f}",
                f"{1e3 * case['median'][OURS]:.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})",
                "" if case["floor"] is None else f"{1e3 * case['floor']:.1f}",
                f"{ratio:.2f}x",
                "" if least is None else f"{least:g}x: {'met' if ratio >= least else 'NOT MET'}",
            ))  # fmt: skip
    return ("work", "against", "ms", "fastvlm ms", "its floor", "ratio", "target"), rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--only", nargs="+", default=[""], help="works whose name has this in it")
    parser.add_argument("--small", action="store_true", help="tiny models, for testing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    works = [work for work in WORKS if any(part in work.name for part in args.only)]
    if not works:
        parser.error(f"--only {' '.join(args.only)}: no work is called so")
    kept = json.loads(args.out.read_text())["cases"] if args.out.exists() else []
    cases = {case["case"]: case for case in kept}
    stamp = env.stamp()
    stamp["versions"] |= translator.version()
    for work in works:
        load = env.load_average()
        figures = measured(work, args.small, args.rounds)
        gc.collect()
        cases[work.name] = {
            **figures, **stamp, "threads": torch.get_num_threads(), "rounds": args.rounds,
            "load_average_before": load, "small": args.small,
        }  # fmt: skip
        print(text_table(*table([cases[work.name]])), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        ordered = [cases[w.name] for w in WORKS if w.name in cases]
        page = {"missing_baselines": dict(measure.MISSING), "cases": ordered}
        args.out.write_text(json.dumps(page, indent=1) + "\n")
    print(f"\nwritten: {args.out}")
    done = [cases[work.name].get("identical_tokens", {OURS: True}) for work in works]
    return 0 if all(identical[OURS] for identical in done) else 1


if __name__ == "__main__":
    sys.exit(main())
