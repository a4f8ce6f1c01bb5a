"""Jobs compiled and read in a pool of processes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tools.compiling import amd, nvidia
from tools.compiling.code import Counts

if TYPE_CHECKING:
    from tools.compiling.driver import Job

_DOT = re.compile(r"tt\.dot\b.*: tensor<(\d+)x(?:\d+x)*(\w+)> \*")
_LOAD = re.compile(r"tt\.load\b.*:\s*(tensor<)?!?\w")


@dataclass
class Result:
    """failure: the compiler's words, and then nothing else counts.

    scalar_loads: loads of single numbers, which are as narrow as they are. dots: rows and bits of
    an element of the first factor of each matrix product. tensor_memory: columns, on Blackwell.
    """

    job: Job
    seconds: float
    counts: Counts | None = None
    failure: str = ""
    scalar_loads: int = 0
    dots: tuple[tuple[int, int], ...] = ()
    tensor_memory: int = 0


def asked(ttir: str) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Loads of single numbers and products of matrices in the kernel as it was written."""
    loads = [found for line in ttir.splitlines() if (found := _LOAD.search(line))]
    dots = {(int(rows), _bits(kind)) for rows, kind in _DOT.findall(ttir)}
    return sum(found[1] is None for found in loads), tuple(sorted(dots))


def _bits(kind: str) -> int:
    """bf16, f32, i8, f8E4M3FN."""
    found = re.match(r"[a-z]+(\d+)", kind)
    return int(found[1]) if found else 0


def compile_one(job: Job) -> Result:
    start = time.perf_counter()
    # imported where it is needed: the pool's initializer sets what Triton reads when imported
    compiled = importlib.import_module("tools.compiling.driver").compiled
    try:
        kernel = compiled(job)
        seconds = time.perf_counter() - start
        result = Result(job, seconds, amd.read(kernel) if _amd(job) else nvidia.read(kernel))
    except Exception as error:
        words = f"{type(error).__name__}: {error}".strip()
        return Result(job, time.perf_counter() - start, failure=words)
    result.scalar_loads, result.dots = asked(kernel.asm["ttir"])
    result.tensor_memory = int(getattr(kernel.metadata, "tmem_size", None) or 0)
    return result


def _amd(job: Job) -> bool:
    return job.arch.startswith("gfx")


def compile_all(
    jobs: Sequence[Job], processes: int = 0, log: Callable[[Result], Any] = lambda result: None
) -> list[Result]:
    """The results in the order of the jobs. A job that takes its process down has failed."""
    results: dict[Job, Result] = {}
    processes = max(1, min(processes or os.cpu_count() or 1, len(jobs)))
    with _pool(processes) as pool:
        futures = {pool.submit(compile_one, job): job for job in jobs}
        for future in as_completed(futures):
            # of a pool that broke no future says whose fault it was
            with suppress(BrokenProcessPool):
                results[futures[future]] = future.result()
                log(results[futures[future]])
    for job in jobs:
        if job not in results:
            results[job] = _alone(job)
            log(results[job])
    return [results[job] for job in jobs]


def _alone(job: Job) -> Result:
    with _pool(1) as pool:
        try:
            return pool.submit(compile_one, job).result()
        except BrokenProcessPool:
            return Result(job, 0.0, failure="the compiler ended its process")


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile afresh: a kept binary may be of other flags than these."""
    # spawned, not forked: PyTorch has threads, and a fork has only the locks they held
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="fastvlm-compile-") as folder,
        ProcessPoolExecutor(processes, context, _prepare, (folder,)) as pool,
    ):
        yield pool


def _prepare(folder: str) -> None:
    """Environment of a compiling process: what the user has set for runs of his own has no say."""
    for name in [name for name in os.environ if name.startswith(("TRITON_", "MLIR_", "LLVM_"))]:
        del os.environ[name]
    os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, str(os.getpid()))
    # Triton means to turn the contraction to FMA off by default; the kernels are written with it
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
