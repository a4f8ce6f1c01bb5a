"""Launchers of csrc/cpu/mlp.cpp: products of a few rows with a weight that is streamed once."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastvlm.cpu.common import dense_last, unavailable, wrong_dtype
from fastvlm.ops.dispatch import Kernel

# benchmarks/results shows 32 rows well ahead of PyTorch; where the two meet depends on the CPU, and
# past twice that PyTorch's packed product is the safe choice
MAX_ROWS = 64
# with bfloat16 instructions in the CPU, PyTorch's product (oneDNN) catches up after a few rows
MAX_ROWS_NATIVE_BF16 = 4


@cache
def _native_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def _too_many_rows(x: Tensor) -> str | None:
    native = x.dtype == torch.bfloat16 and _native_bf16()
    most = MAX_ROWS_NATIVE_BF16 if native else MAX_ROWS
    if x.shape[0] > most:
        return f"{x.shape[0]} rows: PyTorch's own product serves above {most}"
    return None


def _strided(*weights: Tensor | None) -> str | None:
    if any(w is not None and not w.is_contiguous() for w in weights):
        return "a weight that is not contiguous"
    return None


def _unsupported(x: Tensor, *weights: Tensor | None) -> str | None:
    return _strided(*weights) or wrong_dtype(x) or _too_many_rows(x)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.fastvlm_cpu.linear(dense_last(x), weight, bias)


def _low_precision_unsupported(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None
) -> str | None:
    if weight.dtype == x.dtype:
        return _unsupported(x, weight, scale, bias)
    if reason := _strided(weight, scale, bias) or wrong_dtype(x):
        return reason
    if x.shape[0] > MAX_ROWS:
        return f"{x.shape[0]} rows: widening the weight for PyTorch's product pays above {MAX_ROWS}"
    return None


def _low_precision_linear(x: Tensor, weight: Tensor, scale: Any, bias: Any) -> Tensor:
    return torch.ops.fastvlm_cpu.low_precision_linear(dense_last(x), weight, scale, bias)


def _gelu_mlp_unsupported(
    x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, seed: Any, tanh: bool, p: float, keep: bool
) -> str | None:
    if keep or seed is not None:
        return "training (dropout, or a hidden kept for backward) has no CPU kernel"
    return _unsupported(x, w1, b1, w2, b2)


def _gelu_mlp(
    x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, seed: Any, tanh: bool, p: float, keep: bool
) -> tuple[Tensor, Tensor]:
    y = torch.ops.fastvlm_cpu.gelu_mlp(dense_last(x), w1, b1, w2, b2, tanh)
    return y, x.new_empty(0)


def _geglu_mlp_unsupported(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, tanh: bool, keep: bool
) -> str | None:
    if keep:
        return "training (a hidden kept for backward) has no CPU kernel"
    return _unsupported(x, w_gate, w_up, w_down)


def _geglu_mlp(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, tanh: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.ops.fastvlm_cpu.geglu_mlp(dense_last(x), w_gate, w_up, w_down, tanh)
    return y, x.new_empty(0), x.new_empty(0)


KERNELS = {
    "linear": Kernel("cpu", _linear, unavailable, _unsupported),
    "low_precision_linear": Kernel(
        "cpu", _low_precision_linear, unavailable, _low_precision_unsupported
    ),
    "gelu_mlp": Kernel("cpu", _gelu_mlp, unavailable, _gelu_mlp_unsupported),
    "geglu_mlp": Kernel("cpu", _geglu_mlp, unavailable, _geglu_mlp_unsupported),
}
