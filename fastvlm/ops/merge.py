"""merge_attention: two attentions of the same queries as one softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm import checks
from fastvlm.ops._autograd import needs_grad, once_differentiable
from fastvlm.ops.dispatch import define
from fastvlm.reference import merge as reference
from fastvlm.reference.attention import compute_dtype


def _fake_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return out.new_empty(out.shape), out.new_empty(out.shape), lse.new_empty(lse.shape)


_MERGE = define(
    "merge_attention",
    "(Tensor out, Tensor lse, Tensor other, Tensor other_lse) -> Tensor",
    reference.merge_attention,
    lambda out, *rest: out.new_empty(out.shape),
)
_MERGE_BACKWARD = define(
    "merge_attention_backward",
    "(Tensor grad_out, Tensor out, Tensor lse, Tensor other, Tensor other_lse) "
    "-> (Tensor, Tensor, Tensor)",
    reference.merge_attention_backward,
    _fake_backward,
)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
        ctx.save_for_backward(out, lse, other, other_lse)
        return _MERGE(out, lse, other, other_lse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        of_out, of_other, of_lse = _MERGE_BACKWARD(grad_out, *ctx.saved_tensors)
        grads = (of_out, of_lse, of_other, -of_lse)
        return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad))


def merge_attention(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Two attentions of the same queries to keys that are apart, as one softmax over all keys.

    out, other: [T, H, D], float32, bfloat16 or float16, what `self_attention`, `cross_attention` or
    `cached_attention` give with return_lse. lse, other_lse: [T, H], float32 (float64 beside
    float64): their logsumexp.

    Returns [T, H, D] in out's dtype; zeros for a row that sees no key in either. Gradients for all
    four. A second derivative is refused (RuntimeError).

    Raises TypeError or ValueError; the message names the argument.
    """
    op = "merge_attention"
    checks.is_tensor(op, out=out, lse=lse, other=other, other_lse=other_lse)
    checks.is_float(op, "out", out)
    checks.same_kind(op, "out", out, other=other)
    if out.dim() != 3:
        raise checks.fail(op, "out", "of shape [tokens, heads, head_dim]", out)
    checks.has_shape(op, "other", other, list(out.shape))
    for name, tensor in (("lse", lse), ("other_lse", other_lse)):
        if tensor.dtype != compute_dtype(out):
            raise checks.fail(op, name, "float32 (float64 beside a float64 out)", tensor)
        checks.has_shape(op, name, tensor, list(out.shape[:2]))
        checks.same_device(op, "out", out, **{name: tensor})
    if needs_grad(out, lse, other, other_lse):
        merged: Tensor = _Merge.apply(out, lse, other, other_lse)
        return merged
    return _MERGE(out, lse, other, other_lse)
