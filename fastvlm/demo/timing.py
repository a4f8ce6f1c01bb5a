"""One generate() call, split into vision, prefill and decoding, and the memory of its text part.

Two forward hooks, on the vision projector and on the whole model, note when each is done; nothing
inside them is touched, so whatever is fused there stays fused, and both sides carry the same ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.demo.workload import Workload

MIB = 2**20


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
    meter = _meter(next(workload.model.parameters()).device)
    with meter, _Clock(after_vision=meter.reset).attached(workload.model):
        workload.generate()
        return max(meter.peak(), 0) / MIB, meter.method


class _CudaMeter(contextlib.AbstractContextManager[Any]):
    method = "torch.cuda.max_memory_allocated"
    base = 0

    def __exit__(self, *_: object) -> None:
        pass

    def reset(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.base = torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.base


class _HighWaterMeter(_CudaMeter):
    """The kernel's own high-water mark of the resident set: misses nothing, costs nothing."""

    method = "high-water mark of the resident set (VmHWM)"

    @staticmethod
    def permitted() -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return _status("VmHWM") > 0

    def reset(self) -> None:
        _return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")
        self.base = _status("VmRSS")

    def peak(self) -> int:
        return _status("VmHWM") - self.base


class _SampledMeter(_CudaMeter):
    """Where the high-water mark cannot be reset: the resident set, looked at again and again."""

    method = "resident set, sampled every 2 ms"

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._highest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Any:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def reset(self) -> None:
        _return_freed_memory()
        self.base = self._highest = self._process.memory_info().rss

    def peak(self) -> int:
        return self._highest - self.base


def _meter(device: torch.device) -> Any:
    if device.type == "cuda":
        return _CudaMeter()
    return _HighWaterMeter() if _HighWaterMeter.permitted() else _SampledMeter()


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status; 0 where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _return_freed_memory() -> None:
    """Vision's freed memory would otherwise be reused unseen: give it back first (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
