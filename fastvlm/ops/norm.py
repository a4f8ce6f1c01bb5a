"""RMSNorm, LayerNorm and the residual tails of the decoder's branches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm import checks
from fastvlm.checks import FLOATS
from fastvlm.ops._autograd import autocast_wide, needs_grad, once_differentiable, seed_for, wanted
from fastvlm.ops.dispatch import define
from fastvlm.reference import norm as reference


def _empty(tensor: Tensor | None, need: bool, like: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape) if need and tensor is not None else like.new_empty(0)


_RMS_NORM = define(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, float offset) -> Tensor",
    reference.rms_norm,
    lambda x, *rest: x.new_empty(x.shape),
)
_RMS_NORM_BACKWARD = define(
    "rms_norm_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, float eps, float offset, bool[2] needs) "
    "-> (Tensor, Tensor)",
    reference.rms_norm_backward,
    lambda g, x, weight, eps, offset, needs: (
        _empty(x, needs[0], x),
        _empty(weight, needs[1], weight),
    ),
)
_RESIDUAL_RMS_NORM = define(
    "residual_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor? gate, Tensor? next_weight, float eps, "
    "float offset) -> (Tensor, Tensor)",
    reference.residual_rms_norm,
    lambda x, residual, weight, gate, next_weight, *rest: (
        x.new_empty(x.shape),
        _empty(x, next_weight is not None, x),
    ),
)
_RESIDUAL_RMS_NORM_BACKWARD = define(
    "residual_rms_norm_backward",
    "(Tensor? grad_h, Tensor? grad_y, Tensor x, Tensor h, Tensor weight, Tensor? gate, "
    "Tensor? next_weight, float eps, float offset, bool[5] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.residual_rms_norm_backward,
    lambda gh, gy, x, h, weight, gate, next_weight, eps, offset, needs: (
        _empty(x, needs[0], x),
        _empty(x, needs[1], x),
        _empty(weight, needs[2], weight),
        _empty(gate, needs[3], x),
        _empty(next_weight, needs[4], x),
    ),
)
_RESIDUAL_LAYER_NORM = define(
    "residual_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? seed, float eps, "
    "float dropout_p) -> Tensor",
    reference.residual_layer_norm,
    lambda x, *rest: x.new_empty(x.shape),
)
_RESIDUAL_LAYER_NORM_BACKWARD = define(
    "residual_layer_norm_backward",
    "(Tensor grad_out, Tensor x, Tensor residual, Tensor weight, Tensor? seed, float eps, "
    "float dropout_p, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.residual_layer_norm_backward,
    lambda g, x, residual, weight, seed, eps, p, needs: (
        _empty(x, needs[0], x),
        _empty(x, needs[1], x),
        _empty(weight, needs[2], weight),
        _empty(weight, needs[3], weight),
    ),
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = (eps, offset)
        return _RMS_NORM(x, weight, eps, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[:2])
        grads = _RMS_NORM_BACKWARD(grad_out, *ctx.saved_tensors, *ctx.settings, needs)
        return (*wanted(grads, needs), None, None)


class _ResidualRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, gate: Any, next_weight: Any,
        eps: float, offset: float,
    ) -> Any:  # fmt: skip
        ctx.set_materialize_grads(False)
        h, y = _RESIDUAL_RMS_NORM(x, residual, weight, gate, next_weight, eps, offset)
        ctx.save_for_backward(x, h, weight, gate, next_weight)
        ctx.settings = (eps, offset)
        if next_weight is None:
            ctx.mark_non_differentiable(y)
        return h, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Any, grad_y: Any) -> tuple[Any, ...]:
        if grad_h is None and grad_y is None:
            return (None,) * 7
        needs = list(ctx.needs_input_grad[:5])
        grads = _RESIDUAL_RMS_NORM_BACKWARD(
            grad_h, grad_y, *ctx.saved_tensors, *ctx.settings, needs
        )
        return (*wanted(grads, needs), None, None)


class _ResidualLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, seed: Any,
        eps: float, dropout_p: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, residual, weight, seed)
        ctx.settings = (eps, dropout_p)
        return _RESIDUAL_LAYER_NORM(x, residual, weight, bias, seed, eps, dropout_p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[:4])
        # without dropout x and residual have the same gradient: one tensor serves both
        shared = ctx.settings[1] == 0.0 and needs[0] and needs[1]
        asked = [needs[0], needs[1] and not shared, *needs[2:]]
        grads = _RESIDUAL_LAYER_NORM_BACKWARD(grad_out, *ctx.saved_tensors, *ctx.settings, asked)
        dx, dresidual, dweight, dbias = wanted(grads, asked)
        return dx, dx if shared else dresidual, dweight, dbias, None, None, None


def _fits(x: Tensor, residual: Tensor | None, *weights: Tensor) -> bool:
    """Whether all is as it should be; where it is not, `_explain` finds the words."""
    try:
        shape, device = x.shape, x.device
        vector = (shape[-1],)
        if residual is not None and not (
            residual.shape == shape and residual.device == device and residual.dtype in FLOATS
        ):
            return False
        for w in weights:
            if w.shape != vector or w.device != device or w.dtype not in FLOATS:
                return False
        return x.dtype in FLOATS
    except (AttributeError, IndexError):
        return False


def _explain(op: str, x: Tensor, residual: Tensor | None, **weights: Tensor | None) -> None:
    checks.is_tensor(op, x=x)
    checks.is_float(op, "x", x)
    if x.dim() == 0:
        raise checks.fail(op, "x", "of shape [..., features]", x)
    if residual is not None:
        checks.is_tensor(op, residual=residual)
        checks.is_float(op, "residual", residual)
        checks.has_shape(op, "residual", residual, list(x.shape))
        if residual.device != x.device:
            raise checks.fail(op, "residual", f"on the device of x ({x.device})", residual)
    for name, weight in weights.items():
        if weight is None and name == "next_weight":
            continue
        checks.is_tensor(op, **{name: weight})
        assert weight is not None
        checks.is_float(op, name, weight)
        checks.has_shape(op, name, weight, [x.shape[-1]])
        if weight.device != x.device:
            raise checks.fail(op, name, f"on the device of x ({x.device})", weight)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    return rows if rows.dtype == dtype else rows.to(dtype)


def _wider(x: Tensor, residual: Tensor) -> torch.dtype:
    same = x.dtype == residual.dtype
    return x.dtype if same else torch.promote_types(x.dtype, residual.dtype)


def _like(rows: Tensor, x: Tensor) -> Tensor:
    return rows if x.dim() == 2 else rows.view(x.shape)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, offset: float = 1.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dim (RMSNorm, arXiv 1910.07467).

    x: [..., N]. weight: [N], of any float dtype (float32 weights under autocast are usual).
    offset: 1.0 is Gemma's (1 + w), 0.0 is Llama's w. Computed in float32 throughout, the offset
    too, where a sum in bfloat16 would round the weight away.

    Returns [..., N] in x's dtype. Gradients for x and weight; a second derivative is refused
    (RuntimeError). Raises TypeError or ValueError; the message names the argument.
    """
    if not _fits(x, None, weight):
        _explain("rms_norm", x, None, weight=weight)
    run = _RmsNorm.apply if needs_grad(x, weight) else _RMS_NORM
    return _like(run(_rows(x, x.dtype), weight, eps, offset), x)


def residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    gate: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 1.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """h = residual + tanh(gate) * RMS(x), and with next_weight also y = RMS'(h), in one pass.

    The tail of a branch in Gemma-2 (post-norm, add, the next branch's pre-norm), and with a gate
    that of Florenz's inserted cross-attention (arXiv 2503.09443).

    x, residual: [..., N]. weight, next_weight: [N]. gate: one number, [] or [1]; None is no gate
    (factor 1). eps, offset: as in `rms_norm`, for both norms.

    Returns h, or (h, y), in the wider dtype of x and residual. Gradients for all five tensors, each
    only if it wants one; a second derivative is refused (RuntimeError).
    Raises TypeError or ValueError; the message names the argument.
    """
    op = "residual_rms_norm"
    weights = (weight,) if next_weight is None else (weight, next_weight)
    if residual is None or not _fits(x, residual, *weights):
        checks.is_tensor(op, residual=residual)
        _explain(op, x, residual, weight=weight, next_weight=next_weight)
    if gate is not None:
        checks.is_tensor(op, gate=gate)
        checks.is_float(op, "gate", gate)
        if gate.numel() != 1:
            raise checks.fail(op, "gate", "one number, of shape [] or [1]", gate)
        if gate.device != x.device:
            raise checks.fail(op, "gate", f"on the device of x ({x.device})", gate)
    dtype = _wider(x, residual)
    wants = needs_grad(x, residual, weight, gate, next_weight)
    run = _ResidualRmsNorm.apply if wants else _RESIDUAL_RMS_NORM
    h, y = run(_rows(x, dtype), _rows(residual, dtype), weight, gate, next_weight, eps, offset)
    if next_weight is None:
        return _like(h, x)
    return _like(h, x), _like(y, x)


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> Tensor:
    """LayerNorm(residual + dropout(x)) over the last dim: the post-norm tail of BART's branches.

    x, residual: [..., N]. weight, bias: [N]. dropout_p in [0, 1). LayerNorm: arXiv 1607.06450.

    Returns [..., N] in the wider dtype of x and residual (float32 under autocast, as PyTorch's
    layer_norm). Gradients for all four; a second derivative is refused (RuntimeError).
    Raises TypeError or ValueError; the message names the argument.
    """
    op = "residual_layer_norm"
    if residual is None or not _fits(x, residual, weight, bias):
        checks.is_tensor(op, residual=residual)
        _explain(op, x, residual, weight=weight, bias=bias)
    dropout_p = checks.probability(op, "dropout_p", dropout_p)
    x, residual = autocast_wide(x, residual)
    dtype = _wider(x, residual)
    run = (
        _ResidualLayerNorm.apply if needs_grad(x, residual, weight, bias) else _RESIDUAL_LAYER_NORM
    )
    seed = seed_for(x, dropout_p)
    out: Tensor = run(_rows(x, dtype), _rows(residual, dtype), weight, bias, seed, eps, dropout_p)
    return _like(out, x)
