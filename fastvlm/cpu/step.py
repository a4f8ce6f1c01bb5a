"""A planned decoding step as one call of csrc/bind_cpu/step.cpp.

The program is written down as integers once; each step then hands over what has changed. What lies
between the instructions stays in one arena, so that a step allocates its result and nothing else.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastvlm.compat import pytorch
from fastvlm.cpu.common import DTYPES, unavailable
from fastvlm.cpu.gemm import few_rows
from fastvlm.ops import dispatch

# the numbers of the ops, in the order of `Op` in step.cpp
OPS = (
    "linear", "gelu_mlp", "geglu_mlp", "activate", "residual_layer_norm", "rms_norm",
    "residual_rms_norm", "rope", "self_attention", "cross_attention", "layer_norm",
    "merged_attention",
)  # fmt: skip
_seconds: Tensor | None = None


class CpuStep:
    """The instructions (`fastvlm.run.program.Instruction`) of a step, for CPU tensors.

    widths: the elements of a row of each register.
    """

    def __init__(self, instructions: list[Any], widths: list[int]) -> None:
        self._tensors: list[Tensor] = []
        self._numbers: list[float] = []
        self._code: list[int] = []
        registers, self._widths = _registers(instructions, widths)
        for op, results, rows, tensors, settings in instructions:
            self._code.append(OPS.index(op))
            self._list([registers[r] for r in results])
            self._list([registers[r] for r in rows])
            self._list([self._place(tensor) for tensor in tensors])
            self._list([self._number(float(number)) for number in settings])
        self._width = widths[-1]
        self._fixed = [
            torch.tensor(self._code, dtype=torch.int64, device="cpu"),
            torch.tensor(self._widths, dtype=torch.int64, device="cpu"),
            torch.tensor(self._numbers, dtype=torch.float64, device="cpu"),
        ]
        self._known = all(map(_readable, self._tensors))
        self._arena: Tensor | None = None
        self._program: int | None = None

    def _list(self, numbers: list[int]) -> None:
        self._code += [len(numbers), *numbers]

    def _place(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def _number(self, number: float) -> int:
        if number not in self._numbers:
            self._numbers.append(number)
        return self._numbers.index(number)

    def serves(self, x: Tensor) -> bool:
        """Whether this is the way for rows x [R, d]."""
        if not (self._known and x.device.type == "cpu" and x.dtype in DTYPES and few_rows(x)):
            return False
        # a forced backend is for dispatch to find; a dispatch mode wants to see the ops
        return (
            not pytorch.is_watched()
            and dispatch.forced() in (None, "cpu")
            and unavailable() is None
        )

    def __call__(self, x: Tensor, at: Any, layers: list[Any]) -> Tensor:
        """x [R, d], at: `fastvlm.run.step.StepInputs`, layers: of the cache -> [R, d]."""
        x = x.contiguous()
        size = x.shape[0] * sum(self._widths)
        arena = self._arena
        if arena is None or arena.numel() < size or arena.dtype != x.dtype:
            arena = self._arena = x.new_empty(size)
        out = x.new_empty(x.shape[0], self._width)
        caches = [t for layer in layers for t in (layer.k, layer.v)]
        where = [at.where[i] for i in (0, 1, 2)] if at.where else []
        if self._program is None:
            self._program = self._handed_over()
        torch.ops.fastvlm_cpu.step.default(
            x, self._program, caches, at.start, at.lengths, at.ancestry, where,
            [t.contiguous() for t in at.rotation], arena, out, _seconds,
        )  # fmt: skip
        return out

    def _handed_over(self) -> int:
        """The number of the program in the library, which holds its tensors as long as this is."""
        number: int = torch.ops.fastvlm_cpu.step_program(*self._fixed, self._tensors)
        weakref.finalize(self, _forget, self._fixed[0], number).atexit = False
        return number


def _forget(code: Tensor, program: int) -> None:
    with pytorch.unwatched():  # it comes at any time
        torch.ops.fastvlm_cpu.forget_program.default(code, program)


def _readable(tensor: Tensor) -> bool:
    dense = tensor.dim() == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    known = tensor.dtype in DTYPES or tensor.dtype == torch.int8
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and (dense and known)
    )


def _registers(instructions: list[Any], widths: list[int]) -> tuple[list[int], list[int]]:
    """Few registers for many: one is used again once nobody reads it any more.

    Gives the new number of each, and the widths of those in the arena. The first and the last one
    are the step's input and output.
    """
    last_read = {r: i for i, each in enumerate(instructions) for r in each.rows}
    numbers, arena = [0] * len(widths), list[int]()
    free: list[int] = []
    for index, each in enumerate(instructions):
        for register in each.results:
            if register == len(widths) - 1:
                continue
            if not free:
                arena.append(0)
                free.append(len(arena))
            numbers[register] = free.pop()
            place = numbers[register] - 1
            arena[place] = max(arena[place], widths[register])
        # after the results: an instruction must not write what it reads
        read_no_more = {r for r in each.rows if last_read[r] == index and r > 0}
        free += sorted(numbers[r] for r in read_no_more)
        free += [numbers[r] for r in each.results if r not in last_read and r < len(widths) - 1]
    numbers[-1] = len(arena) + 1
    return numbers, arena


@contextlib.contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Inside the block, steps on the CPU measure their instructions: seconds by op, at its end."""
    global _seconds
    found: dict[str, float] = {}
    before, _seconds = _seconds, torch.zeros(len(OPS), dtype=torch.float64, device="cpu")
    try:
        yield found
    finally:
        found.update(zip(OPS, _seconds.tolist()))
        _seconds = before
