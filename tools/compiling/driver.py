"""Launchers run on CPU tensors; what each launch asks of the compiler is recorded, nothing is run.

Triton is given a driver that stands for a GPU of one architecture, so the specialization of a
launch (pointers and sizes divisible by 16, arguments equal to 1, constexprs) is the one that the
same call would get on that GPU. The launch ends in Triton's own hook before the compiler, with the
data from which `JITFunction.preload` compiles it, in any process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver as drivers

from fastvlm.ops import dispatch
from tools.compiling.architectures import ARCHITECTURES


class Fault(RuntimeError):
    """A launcher did what it must not do: ask for a value, or leave the call to somebody else."""


class CompileOnly(DriverBase):
    """A driver without a device."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        known = ARCHITECTURES[arch]
        self.target = GPUTarget(known.backend, known.number or arch, known.warp)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise Fault("a launch that is only compiled cannot be timed")

    def get_current_device(self) -> str:
        # Triton keeps kernels by device: one of its own for each architecture, and none that a
        # real GPU has, or a later call is served with the binary of an earlier architecture
        return f"compile only: {self.arch}"

    def set_current_device(self, device: Any) -> None:
        pass

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@contextlib.contextmanager
def driver(arch: str) -> Iterator[None]:
    """Triton believes that there is a GPU of this architecture; PyTorch is told nothing."""
    before = drivers._active
    drivers.set_active(CompileOnly(arch))
    try:
        yield
    finally:
        drivers._active = before


@dataclass(frozen=True, order=True)
class Job:
    """One compilation. data is Triton's: signature, constexprs, alignments, options, target."""

    arch: str
    module: str
    kernel: str
    data: str

    @property
    def config(self) -> str:
        """Constexprs and options of the launch, as they are told apart in a table."""
        said = json.loads(self.data)
        names, options = list(said["signature"]), said["options"]
        parts = [
            f"{names[key[0]]}={_short(value)}"
            for key, value in zip(said["constant_keys"], said["constant_vals"])
            if len(key) == 1
            and said["signature"][names[key[0]]] == "constexpr"
            # an argument of None is a constexpr too, and a flag beside it says so
            and value is not None
        ]
        return " ".join(
            [*parts, f"warps={options['num_warps']}", f"stages={options['num_stages']}"]
        )

    @property
    def constants(self) -> dict[str, str]:
        """What config says, by name."""
        return dict(part.split("=", 1) for part in self.config.split())

    @property
    def arguments(self) -> str:
        """Types of the run-time arguments, with /16 at those that are multiples of 16."""
        said = json.loads(self.data)
        attributes = {
            tuple(key): value for key, value in zip(said["attrs_keys"], said["attrs_vals"])
        }
        return " ".join(
            f"{kind}{'/16' if _divisible(attributes.get((index,))) else ''}"
            for index, kind in enumerate(said["signature"].values())
            if kind != "constexpr"
        )

    @property
    def warps(self) -> int:
        return int(json.loads(self.data)["options"]["num_warps"])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = next(iter(value.values()))
    return str(int(value) if isinstance(value, bool) else value)


def _divisible(attributes: Any) -> bool:
    return any(name == "tt.divisibility" and value % 16 == 0 for name, value in attributes or ())


@contextlib.contextmanager
def recording(arch: str, value: float | None = None) -> Iterator[list[Job]]:
    """Inside, each launch of a Triton kernel adds a job to the list and does nothing else.

    value: what a launcher gets that asks for a value of a tensor. None: that is a fault.
    """
    launches: list[Job] = []

    def take(*, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        function = fn.jit_function
        data = compile["specialization_data"]
        launches.append(Job(arch, function.fn.__module__, function.fn.__qualname__, data))
        return True  # which tells Triton that there is nothing left to compile or launch

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = take
    try:
        with driver(arch), _Untouched(value):
            yield launches
    finally:
        knobs.runtime.jit_cache_hook = before


class _Untouched(TorchDispatchMode):
    """PyTorch's own ops beside the launches allocate their results and compute nothing.

    The operands are garbage as large as those of training: a product of them would take minutes.
    """

    def __init__(self, value: float | None) -> None:
        super().__init__()
        self.value = value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "fastvlm":
            with self:
                return run(func.name().partition("::")[2].partition(".")[0], *args)
        if func is torch.ops.aten._local_scalar_dense.default:
            if self.value is None:
                raise Fault("the launcher asks for a value of a tensor: a GPU would be waited for")
            return self.value
        if func.is_view:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            out = kwargs.get("out")
            return args[0] if out is None else out
        if any(a.name == "device" for a in func._schema.arguments):
            kwargs["device"] = torch.device("meta")
        shapes = func(*tree_map(_shape, args), **tree_map(_shape, kwargs))
        return tree_map(_allocated, shapes)


def _shape(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")


def _allocated(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cpu")


def run(op: str, *args: Any) -> Any:
    """The launcher of an op, as the dispatcher of a forced backend would call it."""
    kernel = dispatch.OPS[op].kernels.get("triton")
    if kernel is None:
        return dispatch.OPS[op].reference(*args)
    why = kernel.unavailable() or kernel.unsupported(*args)
    if why is not None:
        raise Fault(f"the launcher refuses the call: {why}")
    return kernel.run(*args)


def function(job: Job) -> Any:
    """The kernel that a job is of."""
    found: Any = importlib.import_module(job.module)
    for name in job.kernel.split("."):
        found = getattr(found, name)
    return found


def compiled(job: Job) -> Any:
    """Triton's compiled kernel. Raises whatever the compiler raises."""
    with driver(job.arch):
        kernel = function(job).preload(job.data)
    if kernel is None:
        raise Fault("Triton gave no kernel")
    return kernel
