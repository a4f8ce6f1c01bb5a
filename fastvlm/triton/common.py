"""What the launchers of the Triton backend share."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvlm.reference.mlp import ACTIVATIONS
from fastvlm.triton import configs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def wrong_dtype(x: Tensor) -> str | None:
    return None if x.dtype in DTYPES else f"{x.dtype} (it has float32, bfloat16, float16)"


def unsupported_dtype(*args: Any) -> str | None:
    """The usual reason of a launcher: a floating tensor of another dtype than it has."""
    for x in args:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in DTYPES:
            return wrong_dtype(x)
    return None


def is_tanh(activation: int) -> bool:
    """Of the two activations that kernels have between the products of an MLP, which it is."""
    return ACTIVATIONS[activation] == "gelu_tanh"


def not_gelu(activation: int) -> str | None:
    """Why no kernel can serve an activation."""
    name = ACTIVATIONS[activation]
    return None if name in ("gelu", "gelu_tanh") else f"{name} (it has gelu and gelu_tanh)"


NO_BIAS = "position_bias"


def has_bias(args: tuple[Any, ...], place: int) -> bool:
    """Whether a call has a position_bias, which may be left out at the end of the arguments."""
    return len(args) > place and args[place] is not None


def beyond_kernels(args: tuple[Any, ...], place: int, backward: bool) -> str | None:
    """What a call of packed attention has that no kernel here knows, in words. place: of its
    position_bias; whatever comes from there on may be left out at the end of the arguments."""
    if has_bias(args, place):
        return NO_BIAS
    after = place + (2 if backward else 1)
    if len(args) > after and args[after] != 0:
        return "a window of another length behind a row than before it"
    if backward and has_bias(args, after + 1):
        return "a gradient of the logsumexp"
    return None


@dataclass(frozen=True)
class Launcher:
    """run has the signature of the schema; unsupported(*args) says why a call cannot be served."""

    run: Callable[..., Any]
    unsupported: Callable[..., str | None] = unsupported_dtype


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the one of x."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def multiprocessors(x: Tensor) -> int:
    """How many blocks the device of x works on at once, times their residency."""
    return _multiprocessors(x.device.index) if x.device.type == "cuda" else 128


@functools.cache
def _lanes(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).warp_size)


def lanes(x: Tensor) -> int:
    """Threads of a warp on the device of x."""
    if x.is_cuda:
        return _lanes(x.device.index)
    return 64 if configs.family(x) == "gfx9" else 32


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def dense_last(x: Tensor) -> Tensor:
    """Kernels take any strides but in the last dimension, whose elements they load as vectors."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def keep_threshold(dropout_p: float) -> int:
    """The smallest 53-bit integer that the generator keeps: its value / 2^53 is at least p."""
    return math.ceil(dropout_p * 2**53)


def dot_precision(x: Tensor) -> str:
    """input_precision of a product: full float32, unless PyTorch's own products may use TF32."""
    # 16-bit factors have one precision, and AMD's compiler has no other for float32
    if x.dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = getattr(torch.backends, "fp32_precision", setting)  # of all products
    return "tf32" if setting == "tf32" else "ieee"
