"""How the kernel benchmarks measure: interleaved rounds, cold weights, the floor beside each."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case

ROUNDS = 15
# a decoding step reads each weight once: what a case reads must not be left in a cache by its
# previous round, so a case has copies of its operands that together exceed the caches this often
COLD = 4
MOST_BYTES = 2**31

Operands = tuple[Any, ...]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@functools.cache
def cache_bytes(device: str) -> int:
    """The last-level cache."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(
            int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1)
        )
    return max(sizes, default=32 * 2**20)


def copies_for(case: Case, size: int, device: str) -> int:
    one = case.bytes_moved(size)
    needed = 1 + COLD * cache_bytes(device) // one
    return max(1, min(max(2, needed), MOST_BYTES // one))


class Rotation:
    """Calls a function with the next copy of its operands each time.

    The functions that alternate start at different copies: in step, each would find in the cache
    what the one before it has just read.
    """

    def __init__(
        self, function: Callable[..., Any], copies: Sequence[Operands], start: int = 0
    ) -> None:
        self.function, self.copies, self.next = function, copies, start

    def __call__(self) -> Any:
        self.next = (self.next + 1) % len(self.copies)
        return self.function(*self.copies[self.next])


def timed(function: Callable[[], Any], device: str = "cpu") -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


@functools.cache
def stream_bandwidth(device: str) -> float:
    """Bytes per second of reading memory with all threads: the best of a few sums of 512 MiB."""
    data = torch.ones(2**27, dtype=torch.float32, device=device)
    return data.numel() * 4 / min(timed(data.sum, device) for _ in range(7))


@functools.cache
def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of PyTorch's own large matrix product: best of a few."""
    size = 4096 if device == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / min(timed(lambda: a @ a, device) for _ in range(5))


def floor_seconds(case: Case, dtype: torch.dtype, device: str) -> float:
    """No implementation can be faster: bytes over bandwidth, or work over the GEMM rate."""
    moved = case.bytes_moved(dtype.itemsize) / stream_bandwidth(device)
    # a slow product (bf16 on a CPU without it) is no floor: float32's rate bounds both
    rate = max(gemm_rate(dtype, device), gemm_rate(torch.float32, device))
    return max(moved, case.flops / rate)


def record(
    case: Case, dtype: torch.dtype, device: str, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """What the results file says about one case."""
    floor = floor_seconds(case, dtype, device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(value for name, value in medians.items() if name != "fastvlm")
    return {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": case.rows,
        "bytes": case.bytes_moved(dtype.itemsize),
        "floor_us": round(floor * 1e6, 2),
        "median_us": {name: round(value * 1e6, 2) for name, value in medians.items()},
        "floor_share": {name: round(floor / value, 4) for name, value in medians.items()},
        "ratio": round(best / medians["fastvlm"], 4),
    }
