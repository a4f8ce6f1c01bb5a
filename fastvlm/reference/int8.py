"""Products in int8 arithmetic, in plain PyTorch.

The rows of x are cut along the depth into groups of `GROUP` elements, each stored as int8 with a
factor max |x| / 127, rounded half to even (symmetric dynamic quantization; by groups, as arXiv
2206.01861 has it, so that one large channel costs only its group). Sums of a group are integers,
and exact; float32 from there on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm.reference.mlp import activated
from fastvlm.reference.residual import _sum

GROUP = 64


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> integers from -127 to 127 in float32 [M, G, GROUP], and the factors [M, G].

    Zeros stand behind a depth that is no multiple. A group with a NaN or an infinity is zeros with
    a factor of NaN.
    """
    groups = -(-x.shape[1] // GROUP)
    wide = F.pad(x.float(), (0, groups * GROUP - x.shape[1])).view(x.shape[0], groups, GROUP)
    largest = wide.abs().amax(2) if groups else wide.new_zeros(x.shape[0], 0)
    # at least the smallest normal number, whose inverse is finite
    factor = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
    finite = largest.isfinite()
    whole = torch.where(finite[:, :, None], (wide * (1 / factor)[:, :, None]).round(), 0.0)
    return whole, torch.where(finite, factor, torch.nan)


def _product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] of any float dtype, weight int8 [N, K], scale [N] -> float32 [M, N].

    Integers up to 64 * 127 * 128 are exact in float32.
    """
    whole, factors = quantize_groups(x)
    groups = whole.shape[1]
    wide = F.pad(weight.float(), (0, groups * GROUP - weight.shape[1]))
    parts = wide.view(weight.shape[0], groups, GROUP)
    out = factors.new_zeros(x.shape[0], weight.shape[0])
    for g in range(groups):
        out += F.linear(whole[:, g], parts[:, g]) * factors[:, g : g + 1]
    out *= scale
    return out if bias is None else out + bias.float()


def _end(
    branch: Tensor, residual: Tensor | None, factors: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if residual is not None:
        return _sum(branch, residual, factors)
    if factors is not None:
        branch = branch * factors.repeat_interleave(branch.shape[0] // factors.shape[0])[:, None]
    return branch.to(dtype)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    factors: Tensor | None,
) -> Tensor:
    """x [M, K] weight [N, K]^T + bias, quantized; residual + factors * that where there is one."""
    return _end(_product(x, weight, scale, bias), residual, factors, x.dtype)


def int8_gelu_mlp(
    x: Tensor,
    w1: Tensor,
    scale1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    scale2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    factors: Tensor | None,
    activation: int,
) -> Tensor:
    """The same of w2 activation(w1 x + b1) + b2, quantized again in between; that is float32."""
    pre = _product(x, w1, scale1, b1)
    hidden = activated(pre, activation)
    return _end(_product(hidden, w2, scale2, b2), residual, factors, x.dtype)
