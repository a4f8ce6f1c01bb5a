"""Every compilation that the launchers can ask for: calls x dtypes x architectures x options."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import fastvlm
from fastvlm import triton as backend
from fastvlm.triton import configs
from tools.calls import CALLS
from tools.compiling.architectures import ARCHITECTURES
from tools.compiling.driver import Job, recording, run

# tf32: float32 whose products may round their factors to TF32, as PyTorch's setting allows
DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


@dataclass
class Origin:
    """The calls that end in one job: usual is a single dtype and one or two ops."""

    dtypes: set[str] = field(default_factory=set)
    ops: set[str] = field(default_factory=set)


@dataclass
class Recorded:
    jobs: dict[Job, Origin] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    launches: int = 0


def options(family: str) -> int:
    """How many configs the longest case of a family has: the tuner may take any of them."""
    cases = (case for kernel in configs.table(family).values() for case in kernel)
    return max((len(case.configs) for case in cases), default=1)


def chosen(only: Sequence[str], op: str, kernel: str = "") -> bool:
    return not only or any(name in op or name in kernel for name in only)


def record(
    archs: Sequence[str], only: Sequence[str] = (), first_only: bool = False
) -> Recorded:  # fmt: skip
    """The jobs of all calls of all ops that have a launcher, each job once.

    A name in only selects the ops that contain it and the kernels that do. first_only: with the
    first config of each case, not with each of them.
    """
    found = Recorded()
    ops = [op for names in backend.FLOORS.values() for op in names]
    for op in ops:
        if op not in CALLS and chosen(only, op):
            found.faults.append(f"{op}: tools/calls has no call of it")
    with backend.on_cpu_tensors(), fastvlm.use("triton"):
        for arch in archs:
            family = ARCHITECTURES[arch].family
            for option in range(1 if first_only else options(family)):
                with configs.assumed(family, option):
                    for op in ops:
                        _calls(op, arch, only, found)
    return found


def _calls(op: str, arch: str, only: Sequence[str], found: Recorded) -> None:
    for label, build in CALLS.get(op, ()):
        for dtype in DTYPES:
            if dtype == "tf32" and arch.startswith("gfx"):  # there float32 is always float32
                continue
            launches: list[Job] = []
            try:
                with _products(tf32=dtype == "tf32"):
                    launches = launched(arch, op, build, DTYPES[dtype])
                if not launches:
                    found.faults.append(f"{op} ({label}, {dtype}, {arch}): nothing was launched")
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                why = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
                fault = f"{op} ({label}, {dtype}, {arch}): {why}"
                found.faults += [fault] if chosen(only, op) else []
            for job in launches:
                if chosen(only, op, job.kernel):
                    origin = found.jobs.setdefault(job, Origin())
                    origin.dtypes.add(dtype)
                    origin.ops.add(op)
                    found.launches += 1


@contextmanager
def _products(tf32: bool) -> Iterator[None]:
    """PyTorch's setting for float32 products on CUDA, which the launchers follow."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def launched(
    arch: str, op: str, build: Callable[[torch.dtype], tuple[Any, ...]], dtype: torch.dtype
) -> list[Job]:
    """What one call of an op launches."""
    args = build(dtype)
    with recording(arch) as launches:
        run(op, *args)
    return launches
