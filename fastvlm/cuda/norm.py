"""Launchers of csrc/cuda/norm.cu: one launch forward; one backward, and a sum of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvlm.triton.common import (
    Launcher,
    cdiv,
    dense_last,
    multiprocessors,
    unsupported_dtype,
)

# kWidestRow of csrc/cuda/norm.h
WIDEST = 6144


def _rows_per_block(x: Tensor) -> int:
    """Rows that one backward block adds up: few parts, yet work for every multiprocessor."""
    return max(1, cdiv(x.shape[0], 2 * multiprocessors(x)))


def _vector(weight: Tensor, x: Tensor) -> Tensor:
    """Kernels read vectors of float32 or of the dtype of the rows."""
    other = weight.dtype not in (torch.float32, x.dtype)
    return dense_last(weight.float() if other else weight)


def _optional(weight: Tensor | None, x: Tensor) -> Tensor | None:
    if weight is None or weight.dim() == 0:
        other = weight is not None and weight.dtype not in (torch.float32, x.dtype)
        return weight.float() if other and weight is not None else weight
    return _vector(weight, x)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else dense_last(x)


def _sum(parts: Tensor, like: Tensor | None, need: bool, x: Tensor) -> Tensor:
    """The parts in order, in the dtype of the parameter; an empty tensor where nobody asked."""
    if like is None or not need:
        return (x if like is None else like).new_empty(0)
    return parts.sum(0).to(like.dtype).view(like.shape)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return torch.ops.fastvlm_cuda.rms_norm(dense_last(x), _vector(weight, x), eps, offset)


def _rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    dx, dw = torch.ops.fastvlm_cuda.rms_norm_backward(
        dense_last(grad_out), dense_last(x), _vector(weight, x), eps, offset, _rows_per_block(x),
        *needs,
    )  # fmt: skip
    return dx, _sum(dw, weight, needs[1], x)


def _residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    return torch.ops.fastvlm_cuda.residual_rms_norm(
        dense_last(x), dense_last(residual), _vector(weight, x), _optional(gate, x),
        _optional(next_weight, x), eps, offset,
    )  # fmt: skip


def _residual_rms_norm_backward(
    grad_h: Tensor | None,
    grad_y: Tensor | None,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    offset: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    if next_weight is None:
        grad_y = None  # of the empty tensor that stands for y
    dx, dresidual, dw, dgate, dnext = torch.ops.fastvlm_cuda.residual_rms_norm_backward(
        _dense(grad_h), _dense(grad_y), dense_last(x), dense_last(h), _vector(weight, x),
        _optional(gate, x), _optional(next_weight, x), eps, offset, _rows_per_block(x), *needs,
    )  # fmt: skip
    # as the fake: what stands for a gradient that nobody wants has the dtype of x
    return (
        dx,
        dresidual,
        _sum(dw, weight, needs[2], x),
        _sum(dgate, gate, True, x) if needs[3] else x.new_empty(0),
        _sum(dnext, next_weight, True, x) if needs[4] else x.new_empty(0),
    )


def _residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> Tensor:
    return torch.ops.fastvlm_cuda.residual_layer_norm(
        dense_last(x), dense_last(residual), _vector(weight, x), _vector(bias, x), seed, eps,
        dropout_p,
    )  # fmt: skip


def _residual_layer_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    dx, dresidual, dw, db = torch.ops.fastvlm_cuda.residual_layer_norm_backward(
        dense_last(grad_out), dense_last(x), dense_last(residual), _vector(weight, x), seed, eps,
        dropout_p, _rows_per_block(x), *needs,
    )  # fmt: skip
    return dx, dresidual, _sum(dw, weight, needs[2], x), _sum(db, weight, needs[3], x)


def _unsupported(x: Tensor | None, *rest: Any) -> str | None:
    first = next(t for t in (x, *rest) if isinstance(t, Tensor))
    if first.shape[-1] > WIDEST:
        return f"rows of {first.shape[-1]} (it has up to {WIDEST})"
    return unsupported_dtype(x, *rest)


def _launcher(run: Callable[..., Any]) -> Launcher:
    return Launcher(run, _unsupported)


LAUNCHERS = {
    "rms_norm": _launcher(_rms_norm),
    "rms_norm_backward": _launcher(_rms_norm_backward),
    "residual_rms_norm": _launcher(_residual_rms_norm),
    "residual_rms_norm_backward": _launcher(_residual_rms_norm_backward),
    "residual_layer_norm": _launcher(_residual_layer_norm),
    "residual_layer_norm_backward": _launcher(_residual_layer_norm_backward),
}
