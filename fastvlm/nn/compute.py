"""Layers that compute many rows in int8 or bfloat16: a vision tower, an encoder, a prefill.

Import it where it is needed only, as `fastvlm.nn.low_precision`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm import ops
from fastvlm.cpu import bf16, int8
from fastvlm.cpu.common import DTYPES
from fastvlm.nn.linear import DENSE, Conv2d, Linear
from fastvlm.nn.low_precision import LowPrecisionLinear, stored_copy
from fastvlm.ops import dispatch
from fastvlm.ops._autograd import autocasts
from fastvlm.ops.mlp import _transformed

# fewer rows are as fast as their weights come from memory, whatever multiplies them
FEWEST_ROWS = 65
# what a product of fewer inputs writes takes as long as its sums: with 128 inputs int8 was 0.87
# times as fast as float32, with 256 1.14 times (AVX2, 36,864 and 9,216 rows)
FEWEST_INPUTS = 192


_in_steps: ContextVar[bool] = ContextVar("fastvlm_in_steps", default=False)


@contextlib.contextmanager
def as_in_steps() -> Iterator[None]:
    """Inside, layers with a copy of their weight in fewer bits read it, as few rows do."""
    token = _in_steps.set(True)
    try:
        yield
    finally:
        _in_steps.reset(token)


def unavailable(compute: str) -> str | None:
    """Why there is no "int8" or "bf16" arithmetic here."""
    return int8.unavailable() if compute == "int8" else bf16.unavailable()


def rounds_rows(compute: str) -> bool:
    """Whether rows are rounded to bfloat16 for it, and not quantized: where the CPU multiplies
    tiles of bfloat16, an int8 weight meets them there, faster than in int8 and closer."""
    return compute == "bf16" or bf16.tiles()


def has_few_inputs(compute: str, inputs: int) -> bool:
    """Whether a product alone, outside of an MLP, is not worth quantizing its rows."""
    return not rounds_rows(compute) and inputs < FEWEST_INPUTS


def can(layer: Any, x: Tensor, rows: int | None = None) -> bool:
    """Whether rows like x [..., any] can meet the weight of a layer in its arithmetic.

    rows: how many, where not as many as x has.

    Not: few rows, gradients on, autocast, another dtype than the weight's, a kind of tensor that
    PyTorch dispatches, a compiler or a transform at work, another device or backend.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if _in_steps.get() and isinstance(layer, LowPrecisionLinear):
        return False
    if type(x) not in DENSE or x.device.type != "cpu" or x.dtype not in DTYPES:
        return False
    if rows is None:
        rows = x.numel() // max(1, x.shape[-1])
    if rows < FEWEST_ROWS or autocasts("cpu") or _transformed():
        return False
    weight = layer.weight
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.is_inference():
        return False
    if weight.dtype != x.dtype or dispatch.forced() not in (None, "cpu"):
        return False
    return unavailable(layer.compute) is None


def rounds(layer: Any, x: Tensor) -> bool:
    """Whether rows like x meet a layer's weight rounded to bfloat16: they may be it already."""
    # what a compiler is at work on it does not look into
    return can(layer, x) and rounds_rows(layer.compute)


def copy_of(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The weight of a layer in its arithmetic, and the factors of its rows where it is int8."""
    return stored_copy(layer, layer.compute)


def linear(
    x: Tensor, layer: Any, residual: Tensor | None = None, factors: Tensor | None = None
) -> Tensor | None:
    """residual + factor * layer(x) in the layer's arithmetic; None where it is not worth it, or
    cannot be."""
    # where the width is wrong `ops.linear` says so
    if x.shape[-1] != layer.in_features or not can(layer, x):
        return None
    if rounds_rows(layer.compute):
        return rounded_linear(x, layer, residual, factors)
    if has_few_inputs(layer.compute, layer.in_features):
        return None
    weight, scale = copy_of(layer)
    assert scale is not None
    return ops.int8_linear(x, weight, scale, layer.bias, residual, factors=factors)


def rounded_linear(
    x: Tensor, layer: Any, residual: Tensor | None = None, factors: Tensor | None = None
) -> Tensor:
    """The same where it `rounds` rows, also of rows that are bfloat16 already; so is then what is
    returned without a residual."""
    weight, scale = copy_of(layer)
    return ops.bf16_linear(x, weight, scale, layer.bias, residual, factors=factors)


def conv2d(x: Tensor, layer: Any) -> Tensor | None:
    """layer(x) of a map [B, C, H, W] with both rounded to bfloat16, by PyTorch's library, and so
    are the sums before the bias; None where it cannot be, or they are bfloat16 already."""
    if x.dim() != 4 or x.shape[1] != layer.in_channels or x.dtype == torch.bfloat16:
        return None
    if not can(layer, x, x[:, 0].numel() // (layer.stride[0] * layer.stride[1])):
        return None
    weight, _ = stored_copy(layer, layer.compute)
    weight = weight.unflatten(1, (*layer.kernel_size, layer.in_channels)).permute(0, 3, 1, 2)
    x = x.contiguous(memory_format=torch.channels_last)
    out: Tensor = layer._conv_forward(x.to(torch.bfloat16), weight, None)
    return (out if layer.bias is None else layer.bias[:, None, None] + out).to(x.dtype)


def mlp(
    x: Tensor,
    fc1: Any,
    fc2: Any,
    activation: str,
    residual: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """residual + factor * fc2(activation(fc1 x)), where both layers `can`."""
    (w1, scale1), (w2, scale2) = copy_of(fc1), copy_of(fc2)
    if rounds_rows(fc1.compute):
        return ops.bf16_gelu_mlp(
            *(x, w1, scale1, fc1.bias, w2, scale2, fc2.bias, residual),
            activation=activation,
            factors=factors,
        )
    assert scale1 is not None
    assert scale2 is not None
    return ops.int8_gelu_mlp(
        *(x, w1, scale1, fc1.bias, w2, scale2, fc2.bias, residual),
        activation=activation,
        factors=factors,
    )


class ComputeLinear(Linear):
    """A linear layer whose products of many rows are in int8 or bfloat16; the parameter stays.

    compute: "int8" or "bf16". For inference: where gradients are enabled it computes with its
    weight.
    """

    compute = "int8"

    def forward(self, input: Tensor) -> Tensor:
        out = linear(input, self)
        return super().forward(input) if out is None else out


class ComputeConv2d(Conv2d):
    """The same for a convolution, always in bfloat16."""

    compute = "bf16"

    def forward(self, input: Tensor) -> Tensor:
        out = conv2d(input, self)
        return super().forward(input) if out is None else out


class ComputeLowPrecisionLinear(ComputeLinear, LowPrecisionLinear):
    """The same for a layer that reads fewer bits for few rows."""
