"""Normalization modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvlm import ops
from fastvlm.nn.linear import is_plain, original


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), float32 inside (arXiv 1910.07467); Gemma's offset is 1.

    dim: width of the last dimension. State: ``weight`` [dim], zeros at first for offset 1 and ones
    for offset 0.
    """

    offset: float = 1.0

    def __init__(self, dim: int, eps: float = 1e-6, offset: float = 1.0):
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps, offset=self.offset)


def is_plain_rms_norm(norm: nn.Module) -> bool:
    """Whether a fused kernel may read norm.weight instead of calling it."""
    return isinstance(norm, RMSNorm) and is_plain(norm, original(type(norm)))
