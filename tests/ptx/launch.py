"""Launches of the emulator, run as PTX instead."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cuda_emulator
import numpy as np

from ptx.block import Block
from ptx.memory import Device, Order
from ptx.program import Program, PtxError, parse

_ELSEWHERE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_int, ctypes.c_int,
    ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int,
)  # fmt: skip


def missing() -> str | None:
    return None if shutil.which("nvcc") else "no nvcc (make test-cuda needs it)"


def _readable(symbols: list[str]) -> list[str]:
    """The same for the types of the emulator and those of CUDA."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    text = done.stdout.replace("machine::bf16", "__nv_bfloat16").replace("machine::half", "__half")
    return text.splitlines()


def programs(source: Path, to: Path, *options: str, arch: str = "sm_80") -> dict[str, Program]:
    """What nvcc makes of a file of kernels, by their names as C++ has them."""
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={arch}", "-ptx", *options, str(source)]
    done = subprocess.run(
        [*command, "-o", str(to)], capture_output=True, text=True, check=False,
        env=cuda_emulator.compilers_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = parse(to.read_text())
    return dict(zip(_readable([p.name for p in found]), found))


@dataclass
class Run:
    """Names of the kernels that ran, and the last fault."""

    kernels: list[str] = field(default_factory=list)
    fault: str | None = None


class _Executor:
    def __init__(self, found: dict[str, Program]) -> None:
        self.programs, self.device, self.forgotten = found, Device([]), -1
        self.engine = cuda_emulator.engine()
        self.engine.emulator_regions_forgotten.restype = ctypes.c_uint64
        self.run = Run()

    def regions(self) -> list[tuple[str, int, int, int]]:
        name, begin = ctypes.c_char_p(), ctypes.c_uint64()
        size, access = ctypes.c_int64(), ctypes.c_int()
        found = []
        while self.engine.emulator_region(
            len(found), *(ctypes.byref(x) for x in (name, begin, size, access))
        ):
            assert name.value is not None
            found.append((name.value.decode(), begin.value, size.value, access.value))
        return found

    def launch(
        self, symbol: str, grid: tuple[int, int, int], threads: int, shared: int, given: bytes
    ) -> None:
        (name,) = _readable([symbol])
        program = self.programs.get(name)
        if program is None:
            raise PtxError(f"nvcc made nothing of {name}")
        if program.parameter_bytes != len(given):
            raise PtxError(f"{len(given)} bytes of parameters, not {program.parameter_bytes}")
        forgotten = self.engine.emulator_regions_forgotten()
        if forgotten != self.forgotten:
            self.forgotten, self.device = forgotten, Device(self.regions())
        self.run.kernels.append(name)
        self.device.begin_launch()
        order, parameters = Order(), np.frombuffer(given, np.uint8)
        for number in range(grid[0] * grid[1] * grid[2]):
            place = number % grid[0], number // grid[0] % grid[1], number // grid[0] // grid[1]
            try:
                Block(
                    program, self.device, order, parameters, number, place, grid, threads, shared
                ).run()
            except PtxError as error:
                raise PtxError(f"block {place}: {error}") from None


@contextlib.contextmanager
def executed(found: dict[str, Program]) -> Iterator[Run]:
    """Inside, launches of the emulator run these programs."""
    executor = _Executor(found)

    def elsewhere(
        symbol: bytes, grid: ctypes.Array, threads: int, shared: int, parameters: int, size: int,
        words: int, room: int,
    ) -> int:  # fmt: skip
        try:
            given = ctypes.string_at(parameters, size)
            executor.launch(symbol.decode(), (grid[0], grid[1], grid[2]), threads, shared, given)
        except Exception as error:
            executor.run.fault = f"{type(error).__name__}: {error}"
            text = executor.run.fault.encode()[: room - 1] + b"\0"
            ctypes.memmove(words, text, len(text))
            return 1
        return 0

    callback = _ELSEWHERE(elsewhere)
    executor.engine.emulator_run_elsewhere(callback)
    try:
        yield executor.run
    finally:
        executor.engine.emulator_run_elsewhere(_ELSEWHERE())
