"""How much memory a call takes beyond what is held before it."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


class CudaMeter(contextlib.AbstractContextManager[Any]):
    """reset() before what is to be measured, then peak() in bytes."""

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


class HighWaterMeter(CudaMeter):
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


class SampledMeter(CudaMeter):
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


def meter(device: torch.device) -> Any:
    if device.type == "cuda":
        return CudaMeter()
    return HighWaterMeter() if HighWaterMeter.permitted() else SampledMeter()


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status; 0 where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _return_freed_memory() -> None:
    """Freed memory would otherwise be reused unseen: give it back first (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
