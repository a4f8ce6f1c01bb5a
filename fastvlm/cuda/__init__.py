"""The CUDA backend: kernels of csrc/cuda, in a library of their own.

The library is built where nvcc is and torch is a CUDA build; a call that it does not serve, or that
`fastvlm.cuda.choice` leaves to Triton, goes to the next backend.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch

from fastvlm.cuda import library
from fastvlm.cuda.choice import RULES, yields
from fastvlm.ops.dispatch import CANDIDATES, Kernel, register

# the file under fastvlm/cuda/ that launches each op
FLOORS = {
    "attention": ("cross_attention", "cached_attention"),
    "mlp": ("geglu_mlp", "gelu_mlp", "low_precision_linear", "low_precision_hidden"),
    "loss": ("linear_topk",),
    "norm": (
        "rms_norm",
        "rms_norm_backward",
        "residual_rms_norm",
        "residual_rms_norm_backward",
        "residual_layer_norm",
        "residual_layer_norm_backward",
    ),
}

_on_cpu_tensors = False


def unavailable() -> str | None:
    """Why no kernel here can be used on this machine; None when they can."""
    return None if _on_cpu_tensors else _machine()


@functools.cache
def _machine() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return library.reason()


@contextlib.contextmanager
def on_cpu_tensors() -> Iterator[None]:
    """Let ``fastvlm.use("cuda")`` hand CPU tensors to the launchers, in the whole process.

    For an emulator, whose library of the same kernels and bindings must have been loaded.
    """
    global _on_cpu_tensors
    before, _on_cpu_tensors = _on_cpu_tensors, True
    CANDIDATES["CPU"].append("cuda")
    try:
        yield
    finally:
        CANDIDATES["CPU"].remove("cuda")
        _on_cpu_tensors = before


def _kernel(name: str, floor: str) -> Kernel:
    @functools.cache
    def launcher() -> Any:
        return importlib.import_module(f"fastvlm.cuda.{floor}").LAUNCHERS[name]

    return Kernel(
        "cuda",
        lambda *args: launcher().run(*args),
        unavailable,
        lambda *args: _other_gpu(args) or launcher().unsupported(*args),
        lambda *args: yields(name, args),
        RULES[name].calls,
    )


def _other_gpu(args: tuple[Any, ...]) -> str | None:
    """Why the device of a call is not served: machines may have several."""
    device = next(x for x in args if isinstance(x, torch.Tensor)).device
    return library.unsupported_device(device.index) if device.type == "cuda" else None


for _floor, _names in FLOORS.items():
    for _name in _names:
        register(_name, _kernel(_name, _floor))
