"""Launchers of csrc/cpu/int8.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm import extension
from fastvlm.cpu.common import dense_bias, dense_last, wrong_floats
from fastvlm.ops.dispatch import Kernel


def unavailable() -> str | None:
    """Why there is no int8 arithmetic here."""
    if not extension.available():
        return extension.reason()
    if extension.capability() == "DEFAULT":
        return "it multiplies int8 with AVX2 or AVX-512"
    return None


def _int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Any, residual: Any, factors: Any
) -> Tensor:
    out: Tensor = torch.ops.fastvlm_cpu.int8_linear(
        *(dense_last(x), dense_last(weight), scale.contiguous()),
        *(dense_bias(bias), dense_bias(residual), dense_bias(factors)),
    )
    return out


def _int8_gelu_mlp(
    x: Tensor,
    w1: Tensor,
    scale1: Tensor,
    b1: Any,
    w2: Tensor,
    scale2: Tensor,
    b2: Any,
    residual: Any,
    factors: Any,
    activation: int,
) -> Tensor:
    out: Tensor = torch.ops.fastvlm_cpu.int8_gelu_mlp(
        *(dense_last(x), dense_last(w1), scale1.contiguous(), dense_bias(b1)),
        *(dense_last(w2), scale2.contiguous(), dense_bias(b2)),
        *(dense_bias(residual), dense_bias(factors), activation),
    )
    return out


KERNELS = {
    "int8_linear": Kernel("cpu", _int8_linear, unavailable, wrong_floats),
    "int8_gelu_mlp": Kernel("cpu", _int8_gelu_mlp, unavailable, wrong_floats),
}
