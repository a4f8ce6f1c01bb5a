"""Launchers of csrc/cpu/bf16.cpp."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastvlm import extension
from fastvlm.cpu.common import dense_bias, dense_last, dense_one, wrong_floats
from fastvlm.ops.dispatch import Kernel


@cache
def tiles() -> bool:
    """Whether the CPU multiplies tiles of bfloat16 (AMX)."""
    return extension.capability() == "AMX"


def unavailable() -> str | None:
    """Why there is no bfloat16 arithmetic here."""
    if not extension.available():
        return extension.reason()
    if not tiles() and extension.capability() != "AVX512_BF16":
        return "it multiplies bfloat16 with AMX or AVX-512 BF16"
    return None


def bf16_linear(
    x: Tensor, weight: Tensor, scale: Any, bias: Any, residual: Any, factors: Any
) -> Tensor:
    out: Tensor = torch.ops.fastvlm_cpu.bf16_linear(
        *(dense_one(x), _weight(weight, scale), dense_bias(scale)),
        *(dense_bias(bias), dense_bias(residual), dense_bias(factors)),
    )
    return out


def bf16_gelu_mlp(
    x: Tensor,
    w1: Tensor,
    scale1: Any,
    b1: Any,
    w2: Tensor,
    scale2: Any,
    b2: Any,
    residual: Any,
    factors: Any,
    activation: int,
) -> Tensor:
    out: Tensor = torch.ops.fastvlm_cpu.bf16_mlp(
        *(dense_one(x), _weight(w1, scale1), dense_bias(scale1), dense_bias(b1)),
        *(_weight(w2, scale2), dense_bias(scale2), dense_bias(b2)),
        *(dense_bias(residual), dense_bias(factors), activation),
    )
    return out


def _weight(weight: Tensor, scale: Any) -> Tensor:
    return dense_one(weight) if scale is None else dense_last(weight)


KERNELS = {
    "bf16_linear": Kernel("cpu", bf16_linear, unavailable, wrong_floats),
    "bf16_gelu_mlp": Kernel("cpu", bf16_gelu_mlp, unavailable, wrong_floats),
}
