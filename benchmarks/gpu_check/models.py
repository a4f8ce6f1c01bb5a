"""Florence-2 on a GPU: whole calls and their steps, through transformers and patched, with and
without CUDA graphs, in 16 bits.

Random weights: 16 bits round ties apart, so tokens that differ are said, and fail nothing; the
tests compare tokens in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import fastvlm
from benchmarks.demo import workload
from benchmarks.demo.timing import Run, peak_memory, timed_run
from fastvlm import env
from fastvlm.loading.random_florence2 import load_photo
from fastvlm.run import graphs

SIDES = ("transformers", "fastvlm", "fastvlm, CUDA graphs")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
ROUNDS, TOKENS, BEAMS = 3, 64, 3
# no round is begun where less is left
LEAST = 6.0


def photo() -> Image.Image:
    with contextlib.suppress(ImportError):
        return load_photo(None)[0]
    noise = torch.randint(256, (512, 512, 3), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


@contextlib.contextmanager
def as_side(model: Any, side: str) -> Iterator[None]:
    before = os.environ.get(graphs.VARIABLE)
    os.environ[graphs.VARIABLE] = "1" if side == SIDES[2] else "0"
    try:
        with contextlib.nullcontext() if side == SIDES[0] else fastvlm.patched(model):
            yield
    finally:
        os.environ.pop(graphs.VARIABLE)
        if before is not None:
            os.environ[graphs.VARIABLE] = before


def figures(runs: list[Run]) -> dict[str, Any]:
    def median(name: str) -> float:
        return round(statistics.median(getattr(run, name) for run in runs), 5)

    steps = runs[0].steps
    return {
        **{f"{name}_s": median(name) for name in ("vision", "prefill", "decoding", "total")},
        "steps": steps,
        "step_ms": round(1e3 * median("decoding") / max(steps, 1), 3),
        "rounds": len(runs),
    }


def measured(made: workload.Workload, dtype: str, left: Callable[[], float]) -> dict[str, Any]:
    """All sides in turn; the same model under each."""
    case = f"{made.facts['model']}, {dtype}, {BEAMS} beams"
    found: dict[str, Any] = {"case": case, "failed": {}, "sides": {}}
    runs: dict[str, list[Run]] = {}
    for side in SIDES:
        try:
            with as_side(made.model, side):
                timed_run(made, most_tokens=6)
                memory = round(peak_memory(made)[0], 1)
            runs[side] = []
            found["sides"][side] = {"memory_after_vision_mib": memory}
        except Exception as error:
            found["failed"][side] = f"{type(error).__name__}: {error}"[:1000]
    for _ in range(ROUNDS):
        for side in list(runs):
            if runs[side] and left() < LEAST:
                continue
            try:
                with as_side(made.model, side):
                    runs[side].append(timed_run(made))
            except Exception as error:
                found["failed"][side] = f"{type(error).__name__}: {error}"[:1000]
                del runs[side]
    for side, of_side in runs.items():
        same = (
            torch.equal(of_side[0].tokens, runs[SIDES[0]][0].tokens) if SIDES[0] in runs else None
        )
        found["sides"][side] |= {**figures(of_side), "tokens_as_transformers": same}
    return found


def build(large: bool, tiny: bool, device: str, dtype: torch.dtype) -> workload.Workload:
    return workload.random_workload(
        photo(), beams=BEAMS, new_tokens=8 if tiny else TOKENS, tiny=tiny, large=large,
        device=device, dtype=dtype,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.models")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=85.0)
    parser.add_argument("--rehearse", action="store_true", help="a tiny model, on the CPU")
    args = parser.parse_args(argv)
    device, start = "cpu" if args.rehearse else "cuda", time.monotonic()
    found: list[dict[str, Any]] = []
    head = {**env.stamp(), "device": device, "new_tokens": TOKENS}

    def left() -> float:
        return float(args.seconds - (time.monotonic() - start))

    for large in (False, True):
        for name, dtype in DTYPES.items():
            label = f"{'large' if large else 'base'}, {name}"
            if left() < LEAST:
                found.append({"case": label, "failed": {"all": "left out: no time"}})
                continue
            try:
                made = build(large, args.rehearse, device, dtype)
                found.append(measured(made, name, left))
                del made
            except Exception as error:
                words = f"{type(error).__name__}: {error}"[:1000]
                found.append({"case": label, "failed": {"all": words}})
            if device == "cuda":
                torch.cuda.empty_cache()
            print(json.dumps(found[-1]), flush=True)
            args.out.write_text(json.dumps({**head, "cases": found}, indent=1) + "\n")
    return 1 if any(case["failed"] for case in found) else 0


if __name__ == "__main__":
    sys.exit(main())
