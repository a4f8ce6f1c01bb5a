"""Launchers of csrc/cpu/norm.cpp and norm_backward.cpp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvlm.cpu.common import DTYPES, dense_last, unavailable, wrong_dtype
from fastvlm.ops.dispatch import Kernel

_SEED = torch.int64


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return torch.ops.fastvlm_cpu.rms_norm(dense_last(x), dense_last(weight), eps, offset)


def _rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    dx, dw = torch.ops.fastvlm_cpu.rms_norm_backward(
        dense_last(grad_out), dense_last(x), dense_last(weight), eps, offset, *needs
    )
    return dx, dw.to(weight.dtype)


def _residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    return torch.ops.fastvlm_cpu.residual_rms_norm(
        *map(_dense, (x, residual, weight, gate, next_weight)), eps, offset
    )


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
    tensors = map(_dense, (grad_h, grad_y, x, h, weight, gate, next_weight))
    dx, dresidual, dw, dgate, dnext = torch.ops.fastvlm_cpu.residual_rms_norm_backward(
        *tensors, eps, offset, *needs
    )
    # as the fake: what stands for a gradient that nobody wants has the dtype of x
    return (
        dx,
        dresidual,
        dw.to(weight.dtype),
        _for(gate, dgate, x) if needs[3] else x.new_empty(0),
        _for(next_weight, dnext, x) if needs[4] else x.new_empty(0),
    )


def _for(parameter: Tensor | None, grad: Tensor, x: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its parameter; one of x's where there is none."""
    if parameter is None:
        return x.new_empty(0)
    return grad.to(parameter.dtype).view(parameter.shape)


def _residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> Tensor:
    tensors = map(dense_last, (x, residual, weight, bias))
    return torch.ops.fastvlm_cpu.residual_layer_norm(*tensors, seed, eps, dropout_p)


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
    tensors = map(dense_last, (grad_out, x, residual, weight))
    dx, dresidual, dw, db = torch.ops.fastvlm_cpu.residual_layer_norm_backward(
        *tensors, seed, eps, dropout_p, *needs
    )
    return dx, dresidual, dw.to(weight.dtype), db.to(weight.dtype)


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dim() == 0 else dense_last(x)


def _unsupported(x: Tensor, *rest: Any) -> str | None:
    for tensor in (x, *rest):
        if isinstance(tensor, Tensor) and tensor.dtype not in DTYPES and tensor.dtype != _SEED:
            return wrong_dtype(tensor)
    return None


def _kernel(run: Callable[..., Any]) -> Kernel:
    return Kernel("cpu", run, unavailable, _unsupported)


KERNELS = {
    "rms_norm": _kernel(_rms_norm),
    "rms_norm_backward": _kernel(_rms_norm_backward),
    "residual_rms_norm": _kernel(_residual_rms_norm),
    "residual_rms_norm_backward": _kernel(_residual_rms_norm_backward),
    "residual_layer_norm": _kernel(_residual_layer_norm),
    "residual_layer_norm_backward": _kernel(_residual_layer_norm_backward),
}
