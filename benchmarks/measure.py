"""How the kernel benchmarks measure: interleaved rounds, cold weights, the floor beside each."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kinds import Case

ROUNDS = 15
# a decoding step reads each weight once: what a case reads must not be left in a cache by its
# previous round, so a case has copies of its operands that together exceed the caches this often
COLD = 4
MOST_BYTES = 2**31
# a median over more rounds where one costs next to nothing, over fewer where it takes seconds
QUICK, QUICK_ROUNDS = 5e-3, 10
SLOW, SECONDS, LEAST_ROUNDS = 1.0, 12.0, 3

Operands = tuple[Any, ...]
Function = Callable[..., Any]
# baselines that this run has to do without, and why: the results file says so
MISSING: dict[str, str] = {}


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
    if not case.cold:
        return 1
    one = case.bytes_moved(size)
    needed = 1 + COLD * cache_bytes(device) // one
    return max(1, min(max(2, needed), MOST_BYTES // one))


def rounds_for(asked: int, seconds: float) -> int:
    """seconds: of one round, all sides together."""
    most = asked * (QUICK_ROUNDS if seconds < QUICK else 1)
    return max(min(asked, LEAST_ROUNDS), min(most, int(SECONDS / seconds)))


def trained(forward: Function, wanted: Sequence[int]) -> Function:
    """forward and its backward pass: a function that gives the results and the gradients.

    It is called with the operands of forward and, behind them, the gradient of its results (one
    tensor, or a tuple of them); wanted: the places of the operands whose gradients it gives.
    """

    def run(*operands: Any) -> tuple[Tensor, ...]:
        *inputs, grad = operands
        leaves = [inputs[place].detach().requires_grad_() for place in wanted]
        for place, leaf in zip(wanted, leaves):
            inputs[place] = leaf
        with torch.enable_grad():
            results = as_tuple(forward(*inputs))
        gradients = torch.autograd.grad(results, leaves, as_tuple(grad))
        return (*(result.detach() for result in results), *gradients)

    return run


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


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
    """Seconds of one call; by the clock of a GPU, from its first launch to its last."""
    synchronize(device)
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@functools.cache
def _stream(device: str) -> Tensor:
    return torch.ones(2**27, dtype=torch.float32, device=device)


def stream_bandwidth(device: str) -> float:
    """Bytes per second of reading memory with all threads: the best of a few sums of 512 MiB.

    Measured anew before and after each case: on a virtual machine it changes with the neighbours.
    """
    data = _stream(device)
    return data.numel() * 4 / min(timed(data.sum, device) for _ in range(4))


def release_stream() -> None:
    """Give back what stream_bandwidth reads, where memory is short; the next call makes it anew."""
    _stream.cache_clear()


_BEST_RATE: dict[tuple[torch.dtype, str], float] = {}


def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large matrix product: the best of PyTorch's libraries, of all calls so far.

    A 1x1 convolution is such a product by another library, which on some CPUs uses wider
    instructions than the one behind matmul: the floor must not be what one library reaches.
    """
    size = 4096 if device == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    image, filters = a.view(1, size, 32, -1), a.view(size, size, 1, 1)
    with torch.inference_mode():
        products = (lambda: a @ a, lambda: F.conv2d(image, filters))
        rate = 2 * size**3 / min(timed(run, device) for run in products for _ in range(4))
    best = max(rate, _BEST_RATE.get((dtype, device), 0.0))
    _BEST_RATE[dtype, device] = best
    return best


def floor_seconds(
    case: Case, dtype: torch.dtype, device: str, bandwidth: float
) -> tuple[float, str]:
    """No implementation can be faster: bytes over bandwidth, or work over the GEMM rate."""
    moved = case.bytes_moved(dtype.itemsize) / bandwidth
    if case.flops == 0:
        return moved, "bytes"
    # a slow product (bf16 on a CPU without it) is no floor: float32's rate bounds both
    rate = max(gemm_rate(dtype, device), gemm_rate(torch.float32, device))
    return max((moved, "bytes"), (case.flops / rate, "flops"))


def check_agreement(answers: dict[str, Any], dtype: torch.dtype) -> None:
    """A fast wrong answer is not a result. The tests check precisely; this catches a mix-up."""
    ours = as_tuple(answers["fastvlm"])
    loose = 1e-4 if dtype == torch.float32 else 3e-2
    for name, answer in answers.items():
        theirs = as_tuple(answer)
        assert len(ours) == len(theirs), f"{name} gives {len(theirs)} results, ours {len(ours)}"
        for place, (mine, other) in enumerate(zip(ours, theirs)):
            error = (mine.float() - other.float()).abs().max() / other.float().abs().max()
            assert error < loose, (
                f"result {place} of fastvlm and {name}: {error:.1e} of the largest value apart"
            )


def record(
    case: Case,
    dtype: torch.dtype,
    device: str,
    seconds: dict[str, list[float]],
    bandwidth: float,
) -> dict[str, Any]:
    """What the results file says about one case."""
    floor, bound = floor_seconds(case, dtype, device, bandwidth)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(value for name, value in medians.items() if name != "fastvlm")
    entry = {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": case.rows,
        "rounds": len(seconds["fastvlm"]),
        "bytes": case.bytes_moved(dtype.itemsize),
        "flops": case.flops,
        "stream_gb_per_s": round(bandwidth / 1e9, 2),
        "floor_us": round(floor * 1e6, 2),
        "floor_is": bound,
        "median_us": {name: round(value * 1e6, 2) for name, value in medians.items()},
        "floor_share": {name: round(floor / value, 4) for name, value in medians.items()},
        "ratio": round(best / medians["fastvlm"], 4),
    }
    theirs = case.baseline_bytes(dtype.itemsize)
    return entry if theirs is None else {**entry, "baseline_bytes": theirs}
