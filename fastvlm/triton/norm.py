"""Launchers of the normalizations: one launch forward, one backward and a sum of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvlm.triton.common import (
    Launcher,
    cdiv,
    dense_last,
    device_of,
    keep_threshold,
    lanes,
    multiprocessors,
    next_power_of_2,
    unsupported_dtype,
)
from fastvlm.triton.kernels import norm as kernels

# A row must fit into the registers of a program, in a backward pass with the sums for the weights.
# By the counts of the compiled kernels wider ones would spill on one architecture or another.
WIDEST_RMS, WIDEST_RMS_BACKWARD = 16384, 8192
WIDEST_LAYER, WIDEST_LAYER_BACKWARD = 8192, 4096
# of wider rows the sums for a second RMSNorm get a launch of their own, which reads the rows again
TOGETHER = 4096


def _block(x: Tensor, each: int = 16) -> dict[str, int]:
    """The power of two that holds a row of x, and the warps that share it: each elements a thread.

    16 are two loads of 128 bits of a 16-bit dtype. By the counts of the compiled kernels 8 elements
    leave as many rows under way on a multiprocessor, or fewer, at a quarter more instructions.
    """
    block = max(16, next_power_of_2(x.shape[1]))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // (each * lanes(x))))}


def _rows_per_program(x: Tensor) -> int:
    """Rows that one backward program adds up: few parts, yet work for every multiprocessor."""
    return max(1, cdiv(x.shape[0], 4 * multiprocessors(x)))


def _parts(need: bool, programs: int, x: Tensor) -> Tensor:
    shape = (programs, x.shape[1]) if need else (0,)
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _sum(parts: Tensor, need: bool, like: Tensor | None, x: Tensor) -> Tensor:
    """The parts in order, in the dtype of the weight; an empty tensor where nobody asked."""
    if not need or like is None:
        return (x if like is None else like).new_empty(0)
    return parts.sum(0).to(like.dtype).view(like.shape)


def _grad_of(x: Tensor, need: bool) -> Tensor:
    return x.new_empty(x.shape) if need else x.new_empty(0)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else dense_last(x) if x.dim() else x


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    x, weight = dense_last(x), dense_last(weight)
    out = x.new_empty(x.shape)
    m, n = x.shape
    if out.numel():
        with device_of(x):
            kernels.rms_norm[(m,)](x, weight, out, x.stride(0), n, eps, offset, **_block(x))
    return out


def _rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    grad_out, x, weight = dense_last(grad_out), dense_last(x), dense_last(weight)
    m, n = x.shape
    rows = _rows_per_program(x)
    programs = cdiv(m, rows)
    dx, dw = _grad_of(x, needs[0]), _parts(needs[1], programs, x)
    if x.numel():
        with device_of(x):
            kernels.rms_norm_backward[(programs,)](
                grad_out, x, weight, dx, dw, grad_out.stride(0), x.stride(0), m, n, rows, eps,
                offset, NEED_X=needs[0], NEED_W=needs[1],
                # wide rows: half the warps hold as many rows under way, and what a warp does for
                # the sums of a row, whatever its width, is done half as often
                **_block(x, each=32 if n > 2048 else 16),
            )  # fmt: skip
    return dx, _sum(dw, needs[1], weight, x)


def _residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    x, residual, weight = dense_last(x), dense_last(residual), dense_last(weight)
    next_weight = _dense(next_weight)
    m, n = x.shape
    h = x.new_empty(x.shape)
    y = _grad_of(x, next_weight is not None)
    if h.numel():
        with device_of(x):
            kernels.residual_rms_norm[(m,)](
                x, residual, weight, gate, next_weight, h, y, x.stride(0), residual.stride(0),
                n, eps, offset, HAS_GATE=gate is not None, HAS_NEXT=next_weight is not None,
                **_block(x),
            )  # fmt: skip
    return h, y


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
    grad_h, grad_y, next_weight = _dense(grad_h), _dense(grad_y), _dense(next_weight)
    x, h, weight = dense_last(x), dense_last(h), dense_last(weight)
    need_gate, need_next = needs[3] and gate is not None, needs[4] and next_weight is not None
    m, n = x.shape
    rows = _rows_per_program(x)
    programs = cdiv(m, rows)
    dx, dresidual = _grad_of(x, needs[0]), _grad_of(x, needs[1])
    dw, dnext = _parts(needs[2], programs, x), _parts(need_next, programs, x)
    # rows of width 0 launch nothing
    make = torch.empty if x.numel() else torch.zeros
    dgate = make(programs if need_gate else 0, dtype=torch.float32, device=x.device)

    def run(first: bool, second: bool) -> None:
        kernels.residual_rms_norm_backward[(programs,)](
            grad_h, grad_y, x, h, weight, gate, next_weight, dx, dresidual, dw, dgate, dnext,
            0 if grad_h is None else grad_h.stride(0),
            0 if grad_y is None else grad_y.stride(0),
            x.stride(0), h.stride(0), m, n, rows, eps, offset,
            HAS_GRAD_H=grad_h is not None, HAS_GRAD_Y=grad_y is not None,
            HAS_GATE=gate is not None, NEED_X=first and needs[0],
            NEED_RESIDUAL=first and needs[1], NEED_W=first and needs[2],
            NEED_GATE=first and need_gate, NEED_NEXT=second,
            # 16 elements a thread of two norms at once spill on sm_120
            **_block(x, each=8),
        )  # fmt: skip

    first = any(needs[:3]) or need_gate
    if x.numel():
        with device_of(x):
            if n > TOGETHER and first and need_next:
                run(True, False)
                run(False, True)
            else:
                run(first, need_next)
    # as the fake: what stands for a gradient that nobody wants has the dtype of x
    return (
        dx,
        dresidual,
        _sum(dw, needs[2], weight, x),
        _sum(dgate, True, gate, x) if need_gate else x.new_empty(0),
        _sum(dnext, True, next_weight, x) if need_next else x.new_empty(0),
    )


def _dropout(seed: Tensor | None, dropout_p: float) -> tuple[bool, int, float]:
    """Whether there is one, the generator's threshold, the factor of what is kept."""
    on = seed is not None and dropout_p > 0
    return on, keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p)


def _residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> Tensor:
    x, residual, weight, bias = (dense_last(t) for t in (x, residual, weight, bias))
    out = x.new_empty(x.shape)
    m, n = x.shape
    on, threshold, factor = _dropout(seed, dropout_p)
    if out.numel():
        with device_of(x):
            kernels.residual_layer_norm[(m,)](
                x, residual, weight, bias, seed, out, x.stride(0), residual.stride(0), n, eps,
                threshold, factor, DROPOUT=on, **_block(x),
            )  # fmt: skip
    return out


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
    grad_out, x, residual, weight = (dense_last(t) for t in (grad_out, x, residual, weight))
    m, n = x.shape
    rows = _rows_per_program(x)
    programs = cdiv(m, rows)
    dx, dresidual = _grad_of(x, needs[0]), _grad_of(x, needs[1])
    dw, db = _parts(needs[2], programs, x), _parts(needs[3], programs, x)
    on, threshold, factor = _dropout(seed, dropout_p)
    if x.numel():
        with device_of(x):
            kernels.residual_layer_norm_backward[(programs,)](
                grad_out, x, residual, weight, seed, dx, dresidual, dw, db,
                grad_out.stride(0), x.stride(0), residual.stride(0), m, n, rows, eps, threshold,
                factor, DROPOUT=on, NEED_X=needs[0], NEED_RESIDUAL=needs[1], NEED_W=needs[2],
                NEED_BIAS=needs[3], **_block(x),
            )  # fmt: skip
    return dx, dresidual, _sum(dw, needs[2], weight, x), _sum(db, needs[3], weight, x)


def _launcher(run: Callable[..., Any], widest: int) -> Launcher:
    def unsupported(x: Tensor, *rest: Any) -> str | None:
        first = next(t for t in (x, *rest) if isinstance(t, Tensor))
        if first.shape[-1] > widest:
            return f"rows of {first.shape[-1]} (it has up to {widest})"
        return unsupported_dtype(x, *rest)

    return Launcher(run, unsupported)


LAUNCHERS = {
    "rms_norm": _launcher(_rms_norm, WIDEST_RMS),
    "rms_norm_backward": _launcher(_rms_norm_backward, WIDEST_RMS_BACKWARD),
    "residual_rms_norm": _launcher(_residual_rms_norm, WIDEST_RMS),
    "residual_rms_norm_backward": _launcher(_residual_rms_norm_backward, WIDEST_RMS_BACKWARD),
    "residual_layer_norm": _launcher(_residual_layer_norm, WIDEST_LAYER),
    "residual_layer_norm_backward": _launcher(_residual_layer_norm_backward, WIDEST_LAYER_BACKWARD),
}
