"""``python -m benchmarks.training``: a training step, timed in turns, and its memory.

Sides: transformers eager on a padded batch with one target to an image; the same batch through a
patched model; and six targets to an image, each image once, through a patched model. A step is
forward, backward, clipping and AdamW. All sides share one set of weights, which the steps change.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastvlm
from benchmarks.memory import MIB, ROOT, _status
from benchmarks.training import workload
from fastvlm import env
from fastvlm.tables import text_table

RESULTS = Path(__file__).resolve().parent.parent / "results"
TARGETS = 6
SIDES = ("transformers", "fastvlm", f"fastvlm, {TARGETS} targets")
PARTS = ("forward", "backward", "optimizer")


class Step:
    """One training step of a side; seconds of its parts. autocast: the dtype of its products."""

    def __init__(
        self, shape: workload.Shape, model: Any, optimizer: Any, device: str = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.model, self.optimizer = shape, model, optimizer
        self.device, self.autocast = device, autocast
        self.batches = {}
        for side in SIDES:
            batch = workload.batch(model.config, shape.images, self.targets(side))
            self.batches[side] = {name: value.to(device) for name, value in batch.items()}

    @staticmethod
    def targets(side: str) -> int:
        return TARGETS if side == SIDES[2] else 1

    def __call__(self, side: str) -> tuple[dict[str, float], float]:
        fastvlm.unpatch(self.model)
        if side != SIDES[0]:
            fastvlm.patch(self.model)
        torch.manual_seed(1)  # the same dropout on all sides but for how it is drawn
        marks = [self._now()]
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            loss = self.model(**self.batches[side]).loss
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        marks.append(self._now())
        spans = dict(zip(PARTS, (b - a for a, b in itertools.pairwise(marks))))
        return spans, loss.item()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def build(shape: workload.Shape) -> Step:
    model = shape.model()
    trained = [p for p in model.parameters() if p.requires_grad]
    return Step(shape, model, torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True))


def measure(shape: workload.Shape, rounds: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Medians of a step's parts over interleaved rounds, samples a second, losses at the start."""
    step = build(shape)
    losses = first_losses(step)
    for side in SIDES:
        step(side)  # gradients, optimizer state, libraries
    spans: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES:
            spans[side].append(step(side)[0])
            seconds = sum(spans[side][-1].values())
            progress(f"round {number + 1}, {side}: {seconds:.2f} s")
    sides: dict[str, Any] = {}
    for side in SIDES:
        parts = {part: statistics.median(s[part] for s in spans[side]) for part in PARTS}
        whole = statistics.median(sum(s.values()) for s in spans[side])
        targets = shape.images * step.targets(side)
        sides[side] = {
            "seconds": round(whole, 4),
            "parts": {name: round(value, 4) for name, value in parts.items()},
            "samples_per_second": round(targets / whole, 4),
            "without_optimizer": round(targets / (parts["forward"] + parts["backward"]), 4),
            "batch": workload.tokens(step.batches[side]),
            "all_seconds": [round(sum(s.values()), 4) for s in spans[side]],
        }
    config = step.model.config
    return {
        "shape": shape.name,
        "size": shape.size,
        "reduced": shape.config,
        "parameters": sum(p.numel() for p in step.model.parameters()),
        "trained": sum(p.numel() for p in step.model.parameters() if p.requires_grad),
        "vocabulary": config.decoder.vocab_size,
        "rounds": rounds,
        "loss": losses,
        "sides": sides,
    }


def first_losses(step: Step) -> dict[str, float]:
    """Before any step and without dropout: both sides must see the same loss."""
    step.model.eval()
    found = {}
    with torch.no_grad():
        for side in SIDES[:2]:
            fastvlm.unpatch(step.model)
            if side != SIDES[0]:
                fastvlm.patch(step.model)
            found[side] = step.model(**step.batches[side]).loss.item()
    step.model.train()
    assert abs(found[SIDES[1]] - found[SIDES[0]]) < 1e-4 * abs(found[SIDES[0]]), found
    return found


def peak(shape: workload.Shape, side: str) -> dict[str, float]:
    """MiB that a step takes at its peak beside weights, gradients and optimizer, and in all."""
    step = build(shape)
    step(side)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step(side)
    most = _status("VmHWM")
    return {"step": round((most - before) / MIB, 1), "all": round(most / MIB, 1)}


def peaks(shape: workload.Shape) -> dict[str, dict[str, float]]:
    """Each side in a process of its own."""
    found = {}
    for side in SIDES:
        command = [sys.executable, "-m", "benchmarks.training", "--shape", shape.name]
        command += ["--peak", side, "--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        found[side] = json.loads(done.stdout.splitlines()[-1])
    return found


HEADER = (
    "model", "side", "seconds a step", "samples/s", "faster", "faster without optimizer",
    "MiB of a step", "of transformers'",
)  # fmt: skip


def rows(case: dict[str, Any]) -> list[tuple[str, ...]]:
    base, lines = case["sides"][SIDES[0]], []
    base_mib = case["peak_mib"][SIDES[0]]["step"]
    for side, figures in case["sides"].items():
        mib = case["peak_mib"][side]["step"]
        faster = (figures[key] / base[key] for key in ("samples_per_second", "without_optimizer"))
        lines.append(
            (
                case["shape"],
                side,
                f"{figures['seconds']:.2f}",
                f"{figures['samples_per_second']:.2f}",
                *(f"{ratio:.2f}x" for ratio in faster),
                f"{mib:.0f}",
                f"{100 * mib / base_mib:.0f} %",
            )
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--shape", nargs="+", default=list(workload.TIMED))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--peak", metavar="SIDE", help="only this side's memory, as JSON")
    parser.add_argument("--out", type=Path, default=RESULTS / "training-cpu.json")
    args = parser.parse_args(argv)
    unknown = [name for name in args.shape if name not in workload.SHAPES]
    if unknown:
        parser.error(f"--shape: one of {', '.join(workload.SHAPES)}; got {unknown[0]!r}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    shapes = [workload.SHAPES[name] for name in args.shape]
    if args.peak is not None:
        print(json.dumps(peak(shapes[0], args.peak)))
        return 0
    load, cases = env.load_average(), []
    for shape in shapes:
        memory = peaks(shape)

        def progress(line: str, name: str = shape.name) -> None:
            print(f"{name}: {line}", file=sys.stderr, flush=True)

        cases.append({**measure(shape, args.rounds, progress), "peak_mib": memory})
    print(text_table(HEADER, [row for case in cases for row in rows(case)]))
    head = {**env.stamp(), "device": "cpu", "threads": torch.get_num_threads()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figures = {**head, "load_average_before": load, "cases": cases}
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
