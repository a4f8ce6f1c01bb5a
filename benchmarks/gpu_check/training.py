"""A training step of Florenz on a GPU, bfloat16 autocast: of the 0.4B and of the 3.5B.

The sides are those of benchmarks/training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.__main__ import PARTS, SIDES, Step
from benchmarks.training.workload import SHAPES, Shape
from fastvlm import env

TIMED = (SHAPES["florenz-0.4B"], Shape("florenz-3.5B", {}, 16, "3.5B"))
ROUNDS, LEAST = 3, 6.0


def build(shape: Shape, device: str) -> Step:
    with torch.device(device):  # drawn there: billions of numbers take a CPU a minute
        model = shape.model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)
    return Step(shape, model, optimizer, device, torch.bfloat16)


def measured(shape: Shape, device: str, left: Callable[[], float]) -> dict[str, Any]:
    step = build(shape, device)
    found: dict[str, Any] = {
        "case": shape.name, "failed": {}, "sides": {},
        "parameters": sum(p.numel() for p in step.model.parameters()),
    }  # fmt: skip
    for side in SIDES:
        try:
            step(side)  # gradients, optimizer state, compiled kernels
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            rounds: list[dict[str, float]] = []
            losses: list[float] = []
            while len(rounds) < ROUNDS and (not rounds or left() > LEAST):
                spans, loss = step(side)
                rounds.append(spans)
                losses.append(loss)
            seconds = statistics.median(sum(spans.values()) for spans in rounds)
            targets = shape.images * step.targets(side)
            found["sides"][side] = {
                "seconds": round(seconds, 5),
                "parts": {p: round(statistics.median(s[p] for s in rounds), 5) for p in PARTS},
                "samples_per_second": round(targets / seconds, 3),
                "losses": losses,
                "rounds": len(rounds),
            }
            if device == "cuda":
                most = torch.cuda.max_memory_allocated() - before
                found["sides"][side]["peak_mib"] = round(most / 2**20, 1)
        except Exception as error:
            found["failed"][side] = f"{type(error).__name__}: {error}"[:1000]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.training")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--rehearse", action="store_true", help="a tiny model, on the CPU")
    args = parser.parse_args(argv)
    device, start = "cpu" if args.rehearse else "cuda", time.monotonic()
    shapes = (SHAPES["tiny"],) if args.rehearse else TIMED
    found: list[dict[str, Any]] = []

    def left() -> float:
        return float(args.seconds - (time.monotonic() - start))

    for shape in shapes:
        try:
            found.append(
                measured(shape, device, left)
                if left() > LEAST
                else {"case": shape.name, "failed": {"all": "left out: no time"}}
            )
        except Exception as error:
            words = f"{type(error).__name__}: {error}"[:1000]
            found.append({"case": shape.name, "failed": {"all": words}})
        if device == "cuda":
            torch.cuda.empty_cache()
        print(json.dumps(found[-1]), flush=True)
        head = {**env.stamp(), "device": device}
        args.out.write_text(json.dumps({**head, "cases": found}, indent=1) + "\n")
    return 1 if any(case["failed"] for case in found) else 0


if __name__ == "__main__":
    sys.exit(main())
