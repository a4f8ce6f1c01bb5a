"""The ends of a pre-norm branch: a projection or an MLP, added to what the branch began with.

Where a gradient is wanted they run as plain PyTorch, which differentiates them to any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm import checks
from fastvlm.ops._activation import number_of
from fastvlm.ops._autograd import autocast, autocasts, needs_grad
from fastvlm.ops.dispatch import define
from fastvlm.ops.mlp import rows_of
from fastvlm.reference import residual as reference

_RESIDUAL_LINEAR = define(
    "residual_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? factors) -> Tensor",
    reference.residual_linear,
    lambda x, weight, bias, residual, factors: residual.new_empty(residual.shape),
)
_RESIDUAL_GELU_MLP = define(
    "residual_gelu_mlp",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor residual, Tensor? factors, "
    "int activation) -> Tensor",
    reference.residual_gelu_mlp,
    lambda x, w1, b1, w2, b2, residual, *rest: residual.new_empty(residual.shape),
)


def _rows(
    op: str, x: Tensor, residual: Tensor, factors: Tensor | None, out: int | None
) -> tuple[Tensor, Tensor]:
    """x and residual as rows, once all but the weights is known to fit."""
    checks.is_tensor(op, x=x, residual=residual)
    checks.is_float(op, "x", x)
    checks.is_float(op, "residual", residual)
    if x.dim() == 0:
        raise checks.fail(op, "x", "of shape [..., features]", x)
    checks.has_shape(op, "residual", residual, [*x.shape[:-1], out])
    checks.same_device(op, "x", x, residual=residual)
    if factors is not None:
        checks.is_tensor(op, factors=factors)
        if factors.dtype != torch.float32 or factors.dim() != 1:
            raise checks.fail(op, "factors", "float32 of shape [groups of rows]", factors)
        rows = residual.numel() // max(1, residual.shape[-1])
        if factors.shape[0] == 0 or rows % factors.shape[0]:
            raise checks.fail(op, "factors", f"of a number that divides the {rows} rows", factors)
        checks.same_device(op, "x", x, factors=factors)
    return rows_of(x), rows_of(residual)


def _weights(op: str, x: Tensor, **weights: tuple[Tensor | None, list[int | None]]) -> None:
    for name, (weight, shape) in weights.items():
        if weight is None and name.startswith("b"):
            continue  # a bias may be missing
        checks.is_tensor(op, **{name: weight})
        assert weight is not None
        checks.has_shape(op, name, weight, shape)
        if autocasts(x.device.type):
            checks.is_float(op, name, weight)
            checks.same_device(op, "x", x, **{name: weight})
        else:
            checks.same_kind(op, "x", x, **{name: weight})


def _height(weight: object) -> int | None:
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None


def residual_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    factors: Tensor | None = None,
) -> Tensor:
    """residual + factor * (x weight^T + bias): the end of an attention branch.

    x: [..., K]. weight: [N, K]. bias: [N] or None. These in one dtype, x cast by autocast.
    residual: [..., N], of any float dtype. factors: [G] float32, one for each of G groups of
    neighbouring rows of equal size (stochastic depth: one an image), or None for 1.

    Returns [..., N] in residual's dtype; sums are float32. Differentiable to any order, as plain
    PyTorch. Raises TypeError or ValueError; the message names the argument.
    """
    op = "residual_linear"
    rows, to = _rows(op, x, residual, factors, _height(weight))
    _weights(op, x, weight=(weight, [None, x.shape[-1]]), bias=(bias, [_height(weight)]))
    (rows,) = autocast(rows)
    wants = needs_grad(x, weight, bias, residual, factors)
    run = reference.residual_linear if wants else _RESIDUAL_LINEAR
    return run(rows, weight, bias, to, factors).view(residual.shape)


def residual_gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor,
    *,
    activation: str = "gelu",
    approximate: str | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """residual + factor * (activation(x w1^T + b1) w2^T + b2): the MLP branch of a pre-norm layer.

    x: [..., K]. w1: [F, K], b1: [F] or None, w2: [N, F], b2: [N] or None, one dtype, x cast by
    autocast. residual: [..., N], of any float dtype. activation, approximate: as in `gelu_mlp`.
    factors: as in `residual_linear`.

    Returns [..., N] in residual's dtype; sums are float32. Differentiable to any order, as plain
    PyTorch. Raises TypeError or ValueError; the message names the argument.
    """
    op = "residual_gelu_mlp"
    rows, to = _rows(op, x, residual, factors, _height(w2))
    hidden = _height(w1)
    _weights(
        op,
        x,
        w1=(w1, [None, x.shape[-1]]),
        b1=(b1, [hidden]),
        w2=(w2, [None, hidden]),
        b2=(b2, [_height(w2)]),
    )
    number = number_of(op, activation, approximate, "gelu")
    (rows,) = autocast(rows)
    wants = needs_grad(x, w1, b1, w2, b2, residual, factors)
    run = reference.residual_gelu_mlp if wants else _RESIDUAL_GELU_MLP
    return run(rows, w1, b1, w2, b2, to, factors, number).view(residual.shape)
