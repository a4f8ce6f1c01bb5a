"""Norms and residual tails against transformers' own expressions, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import engines, gpu_baselines
from benchmarks.cases import NORM
from benchmarks.kinds import NormCase
from benchmarks.measure import Function, Operands, trained
from benchmarks.micro import each
from fastvlm import ops

RMS_EPS, LAYER_EPS = 1e-6, 1e-5


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    """Gemma2RMSNorm."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + RMS_EPS)
    return (normed * (1.0 + weight.float())).type_as(x)


def _residual_rms(
    x: Tensor, residual: Tensor, weight: Tensor, gate: Tensor, next_weight: Tensor
) -> tuple[Tensor, Tensor]:
    h = residual + torch.tanh(gate) * _rms(x, weight)
    return h, _rms(h, next_weight)


def _residual_layer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(residual + x, x.shape[-1:], weight, bias, LAYER_EPS)


def _ours_residual_rms(
    x: Tensor, residual: Tensor, weight: Tensor, gate: Tensor, next_weight: Tensor
) -> Any:
    return ops.residual_rms_norm(x, residual, weight, gate=gate, next_weight=next_weight)


# eager, ours, tensors of the activations' shape, results
_OPS: dict[str, tuple[Function, Function, int, int]] = {
    "rms_norm": (_rms, ops.rms_norm, 1, 1),
    "residual_rms_norm": (_residual_rms, _ours_residual_rms, 2, 2),
    "residual_layer_norm": (_residual_layer, ops.residual_layer_norm, 2, 1),
}


def operands(case: NormCase, dtype: torch.dtype, device: str) -> Operands:
    """x, residual, weight, gate and next_weight or bias, as far as the op has them; in training
    the gradients of its results behind them."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    _, _, activations, results = _OPS[case.op]
    rows = [random(case.rows, case.width) for _ in range(activations)]
    weights = [random(case.width).mul_(0.1)]
    if case.op == "residual_rms_norm":
        weights += [random(1), random(case.width).mul_(0.1)]
    if case.op == "residual_layer_norm":
        weights += [random(case.width)]
    if not case.trains:
        return (*rows, *weights)
    grads = tuple(random(case.rows, case.width) for _ in range(results))
    return (*rows, *weights, grads)


def functions(case: NormCase, device: str = "cpu", *, compiled: bool = True) -> dict[str, Function]:
    eager, ours, *_ = _OPS[case.op]
    sides = {"eager": eager, **(engines.compiled(eager) if compiled else {}), "fastvlm": ours}
    if device == "cuda" and case.op == "rms_norm":
        sides |= gpu_baselines.rms_norm(RMS_EPS)
    if not case.trains:
        return sides
    # every operand but the gradients, which come last
    places = range(len(operands(case, torch.float32, "meta")) - 1)
    return {name: trained(side, places) for name, side in sides.items()}


@each(NORM)
def test_norm(
    run_case: Callable[..., None], case: NormCase, dtype: torch.dtype, device: str
) -> None:
    run_case(case, dtype, lambda: operands(case, dtype, device), functions(case, device))
