"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm import checks
from fastvlm.ops._autograd import needs_grad, once_differentiable
from fastvlm.ops.dispatch import define
from fastvlm.reference import rope as reference


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_ROPE = define(
    "rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    reference.rope,
    _fake,
)
_ROPE_BACKWARD = define(
    "rope_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    reference.rope_backward,
    _fake,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        return _ROPE(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Any, ...]:
        return (*_ROPE_BACKWARD(grad_q, grad_k, *ctx.saved_tensors), None, None)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn q and k by the angle of their positions (RoPE, arXiv 2104.09864), half-split form.

    q: [T, H, D]. k: [T, Hkv, D]. cos, sin: [T, R], R even and at most D: transformers' tables, each
    half of R holding all angles; dims past R pass through. Computed in float32.

    Returns q and k turned, in their dtypes. Gradients for q and k; cos and sin are constants and
    must not want one. A second derivative is refused (RuntimeError).

    Raises TypeError or ValueError; the message names the argument.
    """
    op = "rope"
    checks.is_tensor(op, q=q, k=k, cos=cos, sin=sin)
    checks.is_float(op, "q", q)
    checks.same_kind(op, "q", q, k=k)
    if q.dim() != 3:
        raise checks.fail(op, "q", "of shape [tokens, heads, head_dim]", q)
    checks.has_shape(op, "k", k, [q.shape[0], None, q.shape[2]])
    checks.has_shape(op, "cos", cos, [q.shape[0], None])
    checks.has_shape(op, "sin", sin, list(cos.shape))
    if cos.shape[1] % 2 or cos.shape[1] > q.shape[2]:
        raise checks.fail(op, "cos", f"of an even width of at most {q.shape[2]} (head_dim)", cos)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.is_float(op, name, table)
        if table.device != q.device:
            raise checks.fail(op, name, f"on the device of q ({q.device})", table)
        if table.requires_grad:
            raise checks.fail(op, name, "a constant (requires_grad False)", table)
    if needs_grad(q, k):
        turned: tuple[Tensor, Tensor] = _Rope.apply(q, k, cos, sin)
        return turned
    return _ROPE(q, k, cos, sin)
