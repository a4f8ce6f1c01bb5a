"""The Triton backend: kernels for CUDA and ROCm tensors.

Nothing here imports Triton until the first call of a kernel: the package must import, quickly,
where there is none.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fastvlm.ops.dispatch import CANDIDATES, Kernel, register
from fastvlm.reference.mlp import low_precision_hidden

OLDEST = (3, 4)

# the file under fastvlm/triton/ that launches each op
FLOORS = {
    "attention": (
        "cross_attention",
        "cross_attention_backward",
        "self_attention",
        "self_attention_backward",
        "cached_attention",
    ),
    "norm": (
        "rms_norm",
        "rms_norm_backward",
        "residual_rms_norm",
        "residual_rms_norm_backward",
        "residual_layer_norm",
        "residual_layer_norm_backward",
    ),
    "rope": ("rope", "rope_backward"),
    "mlp": (
        "geglu_mlp",
        "geglu_mlp_backward",
        "gelu_mlp",
        "gelu_mlp_backward",
        "low_precision_linear",
    ),
    "loss": ("linear_cross_entropy", "linear_cross_entropy_backward", "linear_topk"),
}

# of which calls are served, where that is not all
CALLS = dict.fromkeys(
    ("geglu_mlp", "geglu_mlp_backward", "gelu_mlp", "gelu_mlp_backward"),
    "activations gelu and gelu_tanh",
)

# what has no kernel here on purpose: plain products are the library's (`mlp.library_serves`), and
# what stands for several ops is run by those
LIBRARY: dict[str, Callable[..., Any]] = {
    "linear": F.linear,
    "low_precision_hidden": low_precision_hidden,
}
OLDEST_CAPABILITY = (8, 0)

_on_cpu_tensors = False


def unavailable() -> str | None:
    """Why no kernel here can be used on this machine; None when they can."""
    return None if _on_cpu_tensors else _machine()


@functools.cache
def _machine() -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    try:
        triton = importlib.import_module("triton")
    except Exception as error:
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"triton {triton.__version__} is too old: {'.'.join(map(str, OLDEST))} or newer"
    return None


@contextlib.contextmanager
def on_cpu_tensors() -> Iterator[None]:
    """Let ``fastvlm.use("triton")`` hand CPU tensors to the launchers, in the whole process.

    For tools that stand in for a GPU: an emulator that executes the launches, or a compiler that
    only compiles them.
    """
    global _on_cpu_tensors
    before, _on_cpu_tensors = _on_cpu_tensors, True
    CANDIDATES["CPU"].append("triton")
    try:
        yield
    finally:
        CANDIDATES["CPU"].remove("triton")
        _on_cpu_tensors = before


def _kernel(name: str, floor: str) -> Kernel:
    @functools.cache
    def launcher() -> Any:
        return importlib.import_module(f"fastvlm.triton.{floor}").LAUNCHERS[name]

    return Kernel(
        "triton",
        lambda *args: launcher().run(*args),
        unavailable,
        lambda *args: _too_old(args) or launcher().unsupported(*args),
        calls=CALLS.get(name),
    )


def _other_dtype(*args: Any) -> str | None:
    return importlib.import_module("fastvlm.triton.common").unsupported_dtype(*args)


def _too_old(args: tuple[Any, ...]) -> str | None:
    """Why the device of a call is not served: machines may have several."""
    device = next(x for x in args if isinstance(x, torch.Tensor)).device
    return _device_too_old(device.index) if device.type == "cuda" else None


@functools.cache
def _device_too_old(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        wanted = ".".join(map(str, OLDEST_CAPABILITY))
        return f"compute capability {'.'.join(map(str, capability))} ({wanted} or newer is needed)"
    return None


for _floor, _names in FLOORS.items():
    for _name in _names:
        register(_name, _kernel(_name, _floor))
for _name, _function in LIBRARY.items():
    register(_name, Kernel("triton", _function, unavailable, _other_dtype))
