"""Linear layers that compute many rows in int8 arithmetic: a vision tower, an encoder, a prefill.

Import it where it is needed only, as `fastvlm.nn.low_precision`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvlm import ops
from fastvlm.cpu.common import DTYPES
from fastvlm.cpu.int8 import unavailable
from fastvlm.nn.linear import DENSE, Linear
from fastvlm.nn.low_precision import LowPrecisionLinear, stored_copy
from fastvlm.ops import dispatch
from fastvlm.ops._autograd import autocasts
from fastvlm.ops.mlp import _transformed

# fewer rows are as fast as their weights come from memory, whatever multiplies them
FEWEST_ROWS = 65
# what a product of fewer inputs writes takes as long as its sums: with 128 inputs int8 was 0.87
# times as fast as float32, with 256 1.14 times (AVX2, 36,864 and 9,216 rows)
FEWEST_INPUTS = 192


def can(layer: Any, x: Tensor) -> bool:
    """Whether rows like x [..., any] can meet the weight of a layer in int8.

    Not: few rows, gradients on, autocast, another dtype than the weight's, a kind of tensor that
    PyTorch dispatches, a compiler or a transform at work, another device or backend.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if type(x) not in DENSE or x.device.type != "cpu" or x.dtype not in DTYPES:
        return False
    if x.numel() < FEWEST_ROWS * x.shape[-1] or autocasts("cpu") or _transformed():
        return False
    weight = layer.weight
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.is_inference():
        return False
    if weight.dtype != x.dtype or dispatch.forced() not in (None, "cpu"):
        return False
    return unavailable() is None


def copy_of(layer: Any) -> tuple[Tensor, Tensor]:
    """The int8 weight of a layer, and the factors of its rows."""
    stored, scale = stored_copy(layer, "int8")
    assert scale is not None
    return stored, scale


def int8_copy(layer: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same where x [..., K] meets it in a product by itself, which must be worth it."""
    inputs = x.shape[-1]
    # where the width is wrong `linear` says so
    if inputs < FEWEST_INPUTS or inputs != layer.in_features or not can(layer, x):
        return None
    return copy_of(layer)


class Int8Linear(Linear):
    """A linear layer whose products of many rows are int8 arithmetic; the parameter stays.

    For inference: where gradients are enabled it computes with its weight.
    """

    compute = "int8"

    def forward(self, input: Tensor) -> Tensor:
        copy = int8_copy(self, input)
        if copy is None:
            return super().forward(input)
        return ops.int8_linear(input, *copy, self.bias)


class Int8LowPrecisionLinear(Int8Linear, LowPrecisionLinear):
    """The same for a layer that reads fewer bits for few rows."""
