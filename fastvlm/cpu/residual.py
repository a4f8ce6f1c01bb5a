"""Launchers of csrc/cpu/packed.cpp with what follows a product, or the library's and then a sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm.cpu.common import DTYPES, unavailable, wrong_dtype
from fastvlm.cpu.gemm import packed_mlp, packed_product, packs, product
from fastvlm.ops.dispatch import Kernel


def _residual_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, factors: Tensor | None
) -> Tensor:
    if packs(x, weight):
        return packed_product(x, weight, bias, residual, _dense(factors))
    return _sum(product(x, _as(x, weight), _as(x, bias)), residual, factors)


def _residual_gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor,
    factors: Tensor | None,
    activation: int,
) -> Tensor:
    if packs(x, w1, w2):
        return packed_mlp(x, w1, b1, w2, b2, residual, _dense(factors), activation)
    pre = product(x, _as(x, w1), _as(x, b1))
    hidden = torch.ops.fastvlm_cpu.activate(pre, None, None, activation, 0.0)
    return _sum(product(hidden, _as(x, w2), _as(x, b2)), residual, factors)


def _dense(factors: Tensor | None) -> Tensor | None:
    return None if factors is None else factors.contiguous()


def _as(x: Tensor, weight: Any) -> Any:
    return weight if weight is None or weight.dtype == x.dtype else weight.to(x.dtype)


def _sum(branch: Tensor, residual: Tensor, factors: Tensor | None) -> Tensor:
    if factors is not None:
        each = factors.repeat_interleave(branch.shape[0] // factors.shape[0])
        branch = branch * each.unsqueeze(1)
    return (residual + branch).to(residual.dtype).contiguous()


def _unsupported(*arguments: Any) -> str | None:
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.dtype not in DTYPES:
            return wrong_dtype(argument)
    return None


KERNELS = {
    "residual_linear": Kernel("cpu", _residual_linear, unavailable, _unsupported),
    "residual_gelu_mlp": Kernel("cpu", _residual_gelu_mlp, unavailable, _unsupported),
}
