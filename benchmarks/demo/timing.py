"""One generate() call, split into vision, prefill and decoding, and the memory of its text part.

Two forward hooks, on the vision projector and on the whole model, note when each is done; nothing
inside them is touched, so whatever is fused there stays fused, and both sides carry the same ones.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.demo.workload import Workload
from fastvlm.checking.meters import MIB, meter


@dataclass(frozen=True)
class Run:
    """Seconds of the phases, which add up to the whole call, and what it generated.

    vision: to the end of the projector. prefill: text encoder and first decoder step. decoding:
    the other steps, with all that generate() does between them.
    """

    vision: float
    prefill: float
    decoding: float
    steps: int
    tokens: Tensor

    @property
    def total(self) -> float:
        return self.vision + self.prefill + self.decoding


class _Clock:
    """Notes the end of the projector, the end of the first step and the number of steps."""

    def __init__(self, after_vision: Callable[[], None] | None = None) -> None:
        self.after_vision = after_vision
        self.vision_done = self.prefill_done = 0.0
        self.calls = 0

    def now(self) -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def projector_hook(self, *_: Any) -> None:
        self.vision_done = self.now()
        if self.after_vision is not None:
            self.after_vision()

    def model_hook(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == 1:
            self.prefill_done = self.now()

    @contextlib.contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        projector: nn.Module = model.model.multi_modal_projector  # type: ignore[union-attr, assignment]
        handles = [
            projector.register_forward_hook(self.projector_hook),
            model.register_forward_hook(self.model_hook),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def timed_run(workload: Workload, most_tokens: int | None = None) -> Run:
    clock = _Clock()
    with clock.attached(workload.model):
        start = clock.now()
        tokens = workload.generate(most_tokens)
        end = clock.now()
    return Run(
        vision=clock.vision_done - start,
        prefill=clock.prefill_done - clock.vision_done,
        decoding=end - clock.prefill_done,
        steps=clock.calls - 1,
        tokens=tokens.cpu(),
    )


def peak_memory(workload: Workload) -> tuple[float, str]:
    """MiB that prefill and decoding take beyond what is held when vision is done, and how it is
    measured. A run of its own: looking costs time."""
    measured = meter(next(workload.model.parameters()).device)
    with measured, _Clock(after_vision=measured.reset).attached(workload.model):
        workload.generate()
        return max(measured.peak(), 0) / MIB, measured.method
