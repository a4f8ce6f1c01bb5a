"""The same workload through transformers and patched, interleaved in one process."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastvlm
from benchmarks.demo.timing import Run, peak_memory, timed_run
from benchmarks.demo.workload import Workload
from fastvlm.checking.sides import SIDES
from fastvlm.checking.tokens import first_difference
from fastvlm.patching.log_probs import LogProbChange

PHASES = {"vision": "vision", "prefill": "prefill", "decoding": "decoding", "total": "whole call"}


@dataclass
class Comparison:
    """All timed runs of both sides, their peak memory in MiB, and the patch's report."""

    runs: dict[str, list[Run]] = field(default_factory=lambda: {side: [] for side in SIDES})
    memory: dict[str, float] = field(default_factory=dict)
    memory_method: str = ""
    patch_report: str = ""
    patch_seconds: float = 0.0
    weights: str | None = None
    change: LogProbChange | None = None

    @property
    def identical(self) -> bool:
        """Whether every run of both sides, all beams, gave the same tokens."""
        first = self.runs[SIDES[0]][0].tokens
        return all(torch.equal(run.tokens, first) for runs in self.runs.values() for run in runs)

    @property
    def difference(self) -> str:
        """Where the tokens first differ; empty if they do not."""
        first = self.runs[SIDES[0]][0].tokens
        for side in SIDES:
            for number, run in enumerate(self.runs[side], 1):
                found = first_difference(run.tokens, first)
                if found is None:
                    continue
                if found.shapes is not None:
                    shapes = "{} and not {}".format(*found.shapes)
                    return f"run {number} of {side} returned tokens of shape {shapes}"
                where = f"beam {found.row}, token {found.place}"
                return f"run {number} of {side} differs first at {where}"
        return ""

    def seconds(self, side: str, phase: str) -> float:
        return statistics.median(getattr(run, phase) for run in self.runs[side])

    def spread(self, side: str) -> float:
        """Slowest over fastest whole call of a side: how noisy the machine was."""
        totals = [run.total for run in self.runs[side]]
        return max(totals) / min(totals)

    def ms_per_step(self, side: str) -> float:
        return 1000 * self.seconds(side, "decoding") / self.runs[side][0].steps

    def tokens_per_second(self, side: str) -> float:
        """Tokens of the caption, not of all beams."""
        return 1000 / self.ms_per_step(side)

    def ratio(self, phase: str) -> float:
        """How many times faster the patched model is."""
        return self.seconds("transformers", phase) / self.seconds("fastvlm", phase)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table: a figure, transformers, fastvlm, how many times better."""
        yes = "yes" if self.identical else "NO"
        rows = [("identical tokens, all beams", "", yes, "")]
        for phase, name in PHASES.items():
            cells = [f"{self.seconds(side, phase):.3f} s" for side in SIDES]
            rows.append((name, cells[0], cells[1], f"{self.ratio(phase):.2f}x"))
        faster = f"{self.ratio('decoding'):.2f}x"
        steps = [f"{self.ms_per_step(side):.1f} ms" for side in SIDES]
        rates = [f"{self.tokens_per_second(side):.1f}" for side in SIDES]
        rows.append(("a decoding step", steps[0], steps[1], faster))
        rows.append(("tokens per second", rates[0], rates[1], faster))
        memory = [f"{self.memory[side]:.0f} MiB" for side in SIDES]
        less = self.memory["transformers"] / max(self.memory["fastvlm"], 1e-3)
        rows.append(("peak memory after vision", memory[0], memory[1], f"{less:.2f}x"))
        return rows

    def figures(self) -> dict[str, Any]:
        """Everything measured, for the results file."""
        sides = {
            side: {
                **{
                    f"{phase}_s": {
                        "median": round(self.seconds(side, phase), 6),
                        "runs": [round(getattr(run, phase), 6) for run in self.runs[side]],
                    }
                    for phase in PHASES
                },
                "spread": round(self.spread(side), 3),
                "steps": self.runs[side][0].steps,
                "ms_per_step": round(self.ms_per_step(side), 4),
                "tokens_per_s": round(self.tokens_per_second(side), 3),
                "peak_memory_mib": round(self.memory[side], 1),
                "tokens": self.runs[side][0].tokens.tolist(),
            }
            for side in SIDES
        }
        return {
            "identical_tokens": self.identical,
            "weights": self.weights,
            "log_prob_change": None if self.change is None else asdict(self.change),
            "sides": sides,
            "ratio": {phase: round(self.ratio(phase), 4) for phase in PHASES},
            "memory_method": self.memory_method,
            "patch_seconds": round(self.patch_seconds, 4),
            "patch_report": self.patch_report.splitlines(),
        }


def compare(
    workload: Workload,
    *,
    rounds: int,
    weights: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Warm up and look at the memory of each side, then run them A B A B.

    weights: as `fastvlm.patch` takes it. The tokens may differ then; what the weights change in
    the log-probabilities of the other side's tokens is reported.

    The model is patched and unpatched around every run, so that both sides are the same weights at
    the same addresses and an unpatch that left something behind would show.
    """
    result = Comparison(weights=weights)

    @contextlib.contextmanager
    def side_of(side: str) -> Iterator[None]:
        if side == "transformers":
            yield
            return
        start = time.perf_counter()
        with fastvlm.patched(workload.model, weights=weights) as report:
            result.patch_seconds = time.perf_counter() - start
            result.patch_report = str(report)
            yield

    for side in SIDES:
        with side_of(side), _announced(progress, f"warm-up, {side}"):
            timed_run(workload, most_tokens=2)
    for side in SIDES:
        with side_of(side), _announced(progress, f"memory, {side}"):
            result.memory[side], result.memory_method = peak_memory(workload)
    for number in range(1, rounds + 1):
        for side in SIDES:
            with side_of(side), _announced(progress, f"run {number} of {rounds}, {side}"):
                result.runs[side].append(timed_run(workload))
    if weights is not None:
        result.change = _change(workload, weights, result.runs[SIDES[0]][0].tokens)
    return result


def _change(workload: Workload, weights: str, tokens: Tensor) -> LogProbChange:
    """Along the first beam that transformers found."""
    inputs = {**workload.inputs, "decoder_input_ids": tokens[:1]}
    with fastvlm.patched(workload.model, weights=weights):
        return fastvlm.log_prob_change(workload.model, inputs)


@contextlib.contextmanager
def _announced(progress: Callable[[str], None], what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    progress(f"{what}: {time.perf_counter() - start:.1f} s")
