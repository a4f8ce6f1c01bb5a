"""The ends of a pre-norm branch, added to what they branch from, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm.reference.mlp import activated


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _sum(branch: Tensor, residual: Tensor, factors: Tensor | None) -> Tensor:
    wide = torch.promote_types(torch.promote_types(branch.dtype, residual.dtype), torch.float32)
    branch = branch.to(wide)
    if factors is not None:
        each = factors.to(wide).repeat_interleave(branch.shape[0] // factors.shape[0])
        branch = branch * each.unsqueeze(1)
    return (residual.to(wide) + branch).to(residual.dtype).contiguous()


def residual_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, factors: Tensor | None
) -> Tensor:
    """residual + factors * (x weight^T + bias): x [M, K], weight [N, K], residual [M, N].

    factors: one for each of as many groups of neighbouring rows.
    """
    return _sum(_product(x, weight, bias), residual, factors)


def residual_gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor,
    factors: Tensor | None,
    activation: int,
) -> Tensor:
    """residual + factors * (activation(x w1^T + b1) w2^T + b2)."""
    hidden = activated(_product(x, w1, b1), activation)
    return _sum(_product(hidden, w2, b2), residual, factors)
