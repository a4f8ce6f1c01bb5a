"""Rotary position embedding (arXiv 2104.09864), the half-split form of transformers."""

from __future__ import annotations

import torch
from torch import Tensor


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D], cos and sin [T, R]: the first R of D dims turn, the others pass through."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rotary = cos.shape[-1]
    turned, rest = x[..., :rotary].to(wide), x[..., rotary:]
    first, second = turned.chunk(2, -1)
    half = torch.cat((-second, first), -1)
    out = turned * cos.to(wide).unsqueeze(1) + half * sin.to(wide).unsqueeze(1)
    return torch.cat((out.to(x.dtype), rest), -1)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, H, D], k [T, Hkv, D], cos, sin [T, R] -> both turned by their position's angle."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate_back(g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of _rotate: right for any cos and sin, not only for halves that repeat."""
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    rotary = cos.shape[-1]
    turned, rest = g[..., :rotary].to(wide), g[..., rotary:]
    first, second = (turned * sin.to(wide).unsqueeze(1)).chunk(2, -1)
    half = torch.cat((second, -first), -1)
    out = turned * cos.to(wide).unsqueeze(1) + half
    return torch.cat((out.to(g.dtype), rest), -1)


def rope_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """dq and dk; cos and sin are constants."""
    return _rotate_back(grad_q, cos, sin), _rotate_back(grad_k, cos, sin)
