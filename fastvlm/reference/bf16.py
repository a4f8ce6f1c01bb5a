"""Products in bfloat16 arithmetic, in plain PyTorch.

x is rounded to bfloat16, half to even; products of two such numbers are exact in float32, and so is
a weight of int8 as bfloat16. Sums, and the factors of an int8 weight after them, are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm.reference.int8 import _end
from fastvlm.reference.mlp import activated


def _product(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [M, K] of any float dtype, weight [N, K] -> float32 [M, N]."""
    out = F.linear(x.to(torch.bfloat16).float(), weight.to(torch.bfloat16).float())
    if scale is not None:
        out *= scale
    return out if bias is None else out + bias.float()


def bf16_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    factors: Tensor | None,
) -> Tensor:
    """x [M, K] weight [N, K]^T + bias, rounded; residual + factors * that where there is one."""
    return _end(_product(x, weight, scale, bias), residual, factors, x.dtype)


def bf16_gelu_mlp(
    x: Tensor,
    w1: Tensor,
    scale1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    scale2: Tensor | None,
    b2: Tensor | None,
    residual: Tensor | None,
    factors: Tensor | None,
    activation: int,
) -> Tensor:
    """The same of w2 activation(w1 x + b1) + b2, rounded again in between."""
    hidden = activated(_product(x, w1, scale1, b1), activation)
    return _end(_product(hidden, w2, scale2, b2), residual, factors, x.dtype)
