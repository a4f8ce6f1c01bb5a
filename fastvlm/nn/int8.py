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


def int8_copy(module: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The int8 weight of a linear layer and its rows' factors, where x [..., K] meets them.

    None where the layer computes as its weight is: few rows, gradients on, autocast, a kind of
    tensor that PyTorch dispatches, a compiler or a transform at work, another device or backend.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if type(x) not in DENSE or x.device.type != "cpu" or x.dtype not in DTYPES:
        return None
    if x.numel() < FEWEST_ROWS * x.shape[-1] or autocasts("cpu") or _transformed():
        return None
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.is_inference():
        return None
    if weight.dtype not in DTYPES or dispatch.forced() not in (None, "cpu"):
        return None
    if unavailable() is not None:
        return None
    stored, scale = stored_copy(module, "int8")
    assert scale is not None
    return stored, scale


def int8_linear_copy(module: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same for a product by itself, which must be worth it; an MLP's inner width always is."""
    return None if x.shape[-1] < FEWEST_INPUTS else int8_copy(module, x)


def int8_mlp_copies(fc1: Any, fc2: Any, x: Tensor) -> tuple[Tensor, ...] | None:
    """The same of the two layers of an MLP: both, or None."""
    if getattr(fc1, "compute", None) is None or getattr(fc2, "compute", None) is None:
        return None
    first = int8_copy(fc1, x)
    # fc2 meets as many rows, of another width and the same kind
    second = None if first is None else int8_copy(fc2, x)
    return None if first is None or second is None else (*first, *second)


class Int8Linear(Linear):
    """A linear layer whose products of many rows are int8 arithmetic; the parameter stays.

    For inference: where gradients are enabled it computes with its weight.
    """

    compute = "int8"

    def forward(self, input: Tensor) -> Tensor:
        copy = int8_linear_copy(self, input)
        if copy is None:
            return super().forward(input)
        return ops.int8_linear(input, *copy, self.bias)


class Int8LowPrecisionLinear(Int8Linear, LowPrecisionLinear):
    """The same for a layer that reads fewer bits for few rows."""
