"""The ops on a GPU, each against what else computes the same; the most telling cases first.

A side's time is that of one call as it comes, launches and Python with it, and that of a call in a
CUDA graph, which is the device's alone. Sides that compile for seconds have a second turn, after
all others; a side that cannot do a case is named with its words. Every case is written at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, kinds, measure
from benchmarks.gpu_check import sides
from fastvlm import env

LOSS_PLAIN = kinds.LossCase("loss-train-plain-256000", 4096, 2304, 256_000, None, 1638, True)
ORDER = (
    "attention-florence2-base-1x3", "attention-gemma2-2b-1x3", "attention-gemma2-2b-8x4",
    "loss-train-256000-4096", "attention-train-cross-gemma2-2b", "mlp-gemma2-2b-3",
    "attention-train-self-gemma2-2b", "norm-train-residual_rms_norm-2304-2304",
    "loss-train-plain-256000", "attention-plain-gemma2-2b-8x4", "loss-topk-257024-32",
    "mlp-train-gemma2-2b-4096", "attention-train-cross-florence2-large", "mlp-florence2-base-3",
    "attention-florence2-base-8x4", "norm-residual_rms_norm-2304-3", "rope-train-gemma2-2b-2304",
    "mlp-gemma2-9b-32", "norm-residual_layer_norm-768-3", "rope-gemma2-2b-3",
    "linear-florence2-base-head-3", "attention-gemma2-9b-8x4", "norm-rms_norm-2304-2304",
    "mlp-train-florence2-large-4096",
)  # fmt: skip
ROUNDS = 15
# no side of a case takes longer than this in all, nor is begun where less is left
ENOUGH, LEAST = 1.0, 5.0
# of a case's operands: enough of them exceed the cache, or they are so small that nobody cares
MOST_COPIES = 64
# of the largest value of a result: a fast wrong answer is not a result, and the tests are exact
APART = 3e-2


def wanted() -> list[kinds.Case]:
    known = {**cases.CASES, LOSS_PLAIN.name: LOSS_PLAIN}
    return [known[name] for name in ORDER]


def small(case: kinds.Case) -> kinds.Case:
    """The same work, so tiny that a CPU does it at once."""
    sizes: dict[type, dict[str, Any]] = {
        kinds.LinearCase: {"inputs": 32, "outputs": 48},
        kinds.MlpCase: {"rows": 3, "width": 32, "hidden": 64},
        kinds.AttentionCase: {"keys": 20, "heads": 4, "kv_heads": 2, "head_dim": 16},
        kinds.CaptionsCase: {"images": 2, "lengths": (3, 5, 2, 7), "heads": 4, "kv_heads": 2,
                             "head_dim": 16},
        kinds.NormCase: {"rows": 3, "width": 32},
        kinds.RopeCase: {"rows": 3, "heads": 4, "kv_heads": 2, "head_dim": 16},
        kinds.LossCase: {"rows": 8, "width": 32, "vocabulary": 100, "counted": 5},
        kinds.TopkCase: {"rows": 4, "width": 32, "vocabulary": 100, "k": 4},
    }  # fmt: skip
    changed = dict(sizes[type(case)])
    if isinstance(case, kinds.CaptionsCase) and case.keys is not None:
        changed["keys"] = 20
    return dataclasses.replace(case, **changed)


def ceilings(device: str) -> dict[str, float]:
    """What this device copies and multiplies at most, of random values."""
    big = device == "cuda"
    size = 2**29 if big else 2**16
    source = torch.rand(size, device=device)
    target = torch.empty_like(source)
    copied = min(measure.timed(lambda: target.copy_(source), device) for _ in range(5))
    n = 8192 if big else 64
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    measure.timed(lambda: a @ b, device)
    product = min(measure.timed(lambda: a @ b, device) for _ in range(5))
    return {
        "copy_bytes_per_s": 2 * 4 * size / copied,
        "bf16_flop_per_s": 2 * n**3 / product,
    }


def agrees(work: sides.Work, name: str, theirs: Any, ours: Any) -> None:
    found, mine = measure.as_tuple(work.comparable(name)(theirs)), measure.as_tuple(ours)
    assert len(found) == len(mine), f"{len(found)} results, ours {len(mine)}"
    for place, (a, b) in enumerate(zip(mine, found)):
        error = ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
        # NaN is never less
        if not error < APART:
            raise AssertionError(f"result {place}: {error:.1e} of the largest value apart")


def call_seconds(turns: dict[str, measure.Rotation], device: str) -> dict[str, float]:
    """Medians of interleaved rounds, of one call each."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    start = time.monotonic()
    for _ in range(ROUNDS):
        for name, turn in turns.items():
            found[name].append(measure.timed(turn, device))
        if time.monotonic() - start > ENOUGH * len(turns):
            break
    return {name: statistics.median(values) for name, values in found.items()}


def graph_seconds(turn: measure.Rotation) -> float:
    """Of one call among as many in a CUDA graph as there are copies of the operands."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        turn()
    torch.cuda.current_stream().wait_stream(stream)
    calls = min(max(len(turn.copies), 4), 40)
    graph = torch.cuda.CUDAGraph()
    kept = []
    with torch.cuda.graph(graph):
        for _ in range(calls):
            kept[:] = [turn()]
    graph.replay()
    return min(measure.timed(graph.replay, "cuda") for _ in range(5)) / calls


def measured(
    case: kinds.Case, dtype: torch.dtype, device: str, slow: bool, limits: dict[str, float],
    time_left: Callable[[], float],
) -> dict[str, Any]:  # fmt: skip
    """slow: ours and the sides that compile, else all others."""
    work = sides.work(case, dtype, device)
    functions = {
        name: function
        for name, function in work.functions().items()
        if name == "fastvlm" or (name in sides.SLOW) == slow
    }
    wanted_copies = min(measure.copies_for(case, dtype.itemsize, device), MOST_COPIES)
    copies = [work.operands() for _ in range(wanted_copies if device == "cuda" else 2)]
    failed: dict[str, str] = {}
    turns: dict[str, measure.Rotation] = {}
    with torch.no_grad() if case.trains else torch.inference_mode():
        ours = functions["fastvlm"](*copies[0])
        for name, function in functions.items():
            if slow and name != "fastvlm" and time_left() < LEAST:
                failed[name] = "left out: no time"
                continue
            try:
                agrees(work, name, function(*copies[0]), ours) if name != "fastvlm" else None
                turns[name] = measure.Rotation(function, copies, start=len(turns))
                turns[name]()
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                turns.pop(name, None)
        seconds = call_seconds(turns, device)
        graphs: dict[str, float] = {}
        for name, turn in turns.items() if device == "cuda" else ():
            try:
                graphs[name] = graph_seconds(turn)
            except Exception as error:
                failed[f"{name}, in a graph"] = f"{type(error).__name__}: {error}"[:300]
                torch.cuda.synchronize()
    floors = {"bytes": case.bytes_moved(dtype.itemsize) / limits["copy_bytes_per_s"],
              "flops": case.flops / limits["bf16_flop_per_s"]}  # fmt: skip
    bound = max(floors, key=lambda name: floors[name])
    return {
        "case": case.name, "dtype": str(dtype).removeprefix("torch."), "compiled": slow,
        "floor_us": round(floors[bound] * 1e6, 2), "floor_is": bound,
        "call_us": {name: round(value * 1e6, 2) for name, value in seconds.items()},
        "graph_us": {name: round(value * 1e6, 2) for name, value in graphs.items()},
        "failed": failed,
    }  # fmt: skip


def _turns(all_cases: list[kinds.Case]) -> Iterator[tuple[kinds.Case, bool]]:
    yield from ((case, False) for case in all_cases)
    yield from ((case, True) for case in all_cases)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.ops")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args(argv)
    device = "cpu" if args.rehearse else "cuda"
    start = time.monotonic()
    todo = [small(case) for case in wanted()] if args.rehearse else wanted()
    limits = ceilings(device)
    found: list[dict[str, Any]] = []
    broken = 0
    head = {**env.stamp(), "device": device, "rounds": ROUNDS, **limits}

    def left() -> float:
        return float(args.seconds - (time.monotonic() - start))

    for case, slow in _turns(todo):
        if left() < LEAST:
            found.append({"case": case.name, "compiled": slow, "error": "left out: no time"})
            continue
        try:
            # a compiler of a rehearsal would take minutes to say what the first says
            if slow and args.rehearse:
                continue
            found.append(measured(case, torch.bfloat16, device, slow, limits, left))
        except Exception as error:
            broken += 1
            words = f"{type(error).__name__}: {error}"
            found.append({"case": case.name, "compiled": slow, "error": words[:1000]})
        if device == "cuda":
            torch.cuda.empty_cache()
        print(json.dumps(found[-1]), flush=True)
        text = json.dumps({**head, "missing": measure.MISSING, "cases": found}, indent=1)
        args.out.write_text(text + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
