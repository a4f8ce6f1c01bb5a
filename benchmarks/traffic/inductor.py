"""What torch.compile launches, counted from the code that it generates for a GPU.

The generated Python runs on fake tensors, so that its calls of libraries are operators, counted as
anywhere else. Its Triton kernels are not run: their bytes are what Inductor itself says that each
reads and writes of its arguments, which is at most the tensors, and less where it reads a part of
one. Default mode; padding of products is off, as the compiler would time it on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import sympy
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codegen.common import TensorArg
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V

from benchmarks.traffic import no_device
from benchmarks.traffic.counter import Traffic


@dataclass
class Compiled:
    """forward, backward: the launches of the graphs that ran. graphs: how many were generated."""

    forward: Traffic = field(default_factory=Traffic)
    backward: Traffic = field(default_factory=Traffic)
    graphs: int = 0
    breaks: dict[str, int] = field(default_factory=dict)


def _elements(dep: Any) -> int:
    """How many elements of its buffer one access of a kernel touches: a broadcast touches one."""
    if not dep.is_indirect():
        return _number(dep.get_numel())
    return _number(sympy.prod(dep.size))


def _number(expression: Any) -> int:
    return int(V.graph.sizevars.optimization_hint(expression))


def _touched(name: str, deps: set[Any]) -> int:
    """Bytes of a buffer that these accesses touch: never more than it has."""
    size = V.graph.get_dtype(name).itemsize
    return size * min(_number(V.graph.get_numel(name)), sum(map(_elements, deps)))


def kernel_bytes(kernel: Any) -> int:
    """What one launch of a generated kernel reads and writes."""
    accesses: dict[str, dict[str, set[Any]]] = {"reads": {}, "writes": {}}
    for node in kernel.features.scheduler_nodes():
        for kind, found in accesses.items():
            for dep in getattr(node.read_writes, kind):
                found.setdefault(dep.name, set()).add(dep)
    total = 0
    for argument in kernel.args.python_argdefs()[2]:
        if not isinstance(argument, TensorArg):
            continue
        reads, writes = accesses["reads"], accesses["writes"]
        if argument.name.startswith("in_out"):
            # one piece of memory under the names that it has had
            names = next(
                place.other_names
                for place in kernel.args.inplace_buffers.values()
                if getattr(place, "inner_name", None) == argument.name
            )
            made = next((name for name in names if name in writes), names[-1])
            total += _touched(made, writes.get(made, set()))
            before = [name for name in names if name not in writes]
            total += sum(_touched(name, reads.get(name, set())) for name in before)
        elif argument.buffer in writes:
            # what it has written it still has
            total += _touched(argument.buffer, writes[argument.buffer])
        else:
            total += _touched(argument.buffer, reads.get(argument.buffer, set()))
    return total


class _Launch:
    """Stands for a generated Triton kernel in the generated code."""

    def __init__(self, name: str, launched: Any) -> None:
        self.name, self.launched = name, launched

    def run(self, *args: Any, **kwargs: Any) -> None:
        self.launched(self.name)


def _runnable(module: Any) -> Any:
    """The generated module, allocating what is fake."""

    def empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")

    def view(x: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
        return torch.as_strided(x, size, stride, offset)

    module.empty_strided_cuda, module.reinterpret_tensor = empty, view
    return module


@contextlib.contextmanager
def counted() -> Iterator[Compiled]:
    """Inside, what torch.compile has compiled is counted when it runs, on fake CUDA tensors.

    The process must have been started with `no_device.preloaded`.
    """
    found = Compiled()
    # of the graph whose code is being generated or run: bytes of the launches, in order
    planned: list[tuple[str, int]] = []
    compile_to_module, call_kernel = GraphLowering._compile_to_module, TritonKernel.call_kernel
    now: list[Any] = []

    def call(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        planned.append((name, kernel_bytes(self)))
        return call_kernel(self, name, *args, **kwargs)

    def launched(name: str) -> None:
        traffic, launches = now[-1]
        expected, moved = next(launches)
        if name != expected:
            raise RuntimeError(f"the generated code launches {name} where {expected} was planned")
        traffic.launch(f"triton.{name}", moved)

    def compiled(self: Any) -> Any:
        planned.clear()
        module = _runnable(compile_to_module(self))
        launches = list(planned)
        traffic = found.backward if self.is_backward else found.forward
        found.graphs += 1

        def run(args: Any) -> Any:
            now.append((traffic, iter(launches)))
            try:
                with traffic:
                    result = module.call(args)
                left = list(now[-1][1])
            finally:
                now.pop()
            if left:
                raise RuntimeError(f"planned and not launched: {left}")
            return result

        return _Module(run, module.__file__)

    def kernel(self: Any, name: str, *args: Any, **kwargs: Any) -> _Launch:
        return _Launch(name, launched)

    options = {"force_disable_caches": True, "compile_threads": 1, "shape_padding": False}
    torch._dynamo.reset()
    counters.clear()
    with (
        mock.patch.object(GraphLowering, "_compile_to_module", compiled),
        mock.patch.object(TritonKernel, "call_kernel", call),
        mock.patch.object(AsyncCompile, "triton", kernel),
        config.patch(options),
        no_device.h100(),
    ):
        yield found
    found.breaks = dict(counters["graph_break"])
    torch._dynamo.reset()


@dataclass
class _Module:
    call: Any
    __file__: str
