"""How many pictures decode together: as many as memory has room for, half once it runs out."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

# beyond these a step gains nothing: on a CPU the tower is bound by arithmetic from one picture on
MOST_ON_CPU, MOST_ON_GPU = 8, 64
# of the memory that is free; the rest is for pictures that wait, and for others
SHARE = 0.5


def out_of_memory(error: BaseException) -> bool:
    """Whether this is PyTorch's, or Python's, way to say that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
    )


def give_back() -> None:
    """Free memory that the allocator of C keeps, back to the system; where that is glibc.

    Pixels are made in one thread and freed in another, so that its arenas fill up with holes.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class BatchSize:
    """The most pictures of a batch, on one device.

    fixed: that many, unless memory runs out. None: from 1 on, doubled while twice as many would
    take no more than `SHARE` of the memory that is free, by what the largest batch so far took.
    """

    def __init__(self, fixed: int | None, device: torch.device) -> None:
        self.device = device
        self.grows = fixed is None
        self.most = fixed or (MOST_ON_CPU if device.type == "cpu" else MOST_ON_GPU)
        self.limit = fixed or 1

    def halve(self) -> None:
        """After memory ran out: half, for good."""
        self.limit = self.most = max(1, self.limit // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def measured(self, count: int, new: int | None = None) -> Iterator[None]:
        """Around a batch of count pictures, new of which come here (None: all); afterwards the
        limit may be another."""
        if not self.grows or count < self.limit or self.limit >= self.most:
            yield
            return
        with _Peak(self.device) as peak:
            yield
        room = SHARE * (_free(self.device) + peak.held())
        if 2 * peak.taken * count / (new or count) <= room:
            self.limit = min(2 * self.limit, self.most)
        else:
            self.grows = False


class _Peak:
    """The memory that a block takes at its worst, above what was taken before it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.taken = 0

    def __enter__(self) -> _Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = self._most = _resident()
            self._done = threading.Event()
            self._watch = threading.Thread(target=self._sample, daemon=True)
            self._watch.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self._most = max(self._most, _resident())

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.taken = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._done.set()
            self._watch.join()
            self.taken = max(self._most, _resident()) - self._before

    def held(self) -> int:
        """What is still held of it, and would be used again."""
        if self.device.type == "cuda":
            reserved = torch.cuda.memory_reserved(self.device)
            return reserved - torch.cuda.memory_allocated(self.device)
        return max(0, _resident() - self._before)


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except (OSError, ValueError, IndexError):
        return 0


def _free(device: torch.device) -> int:
    """Bytes that may still be taken; 0 where nobody can say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = 0
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(x for x in lines if x.startswith("MemAvailable")).split()[1])
    with contextlib.suppress(OSError, ValueError):  # of a container, where it has a limit
        group = Path("/sys/fs/cgroup")
        most = int((group / "memory.max").read_text())
        free = min(free, most - int((group / "memory.current").read_text()))
    return max(0, free)
