"""Normalizations and their residual tails, in plain PyTorch, float32 inside.

RMSNorm is arXiv 1910.07467 with Gemma's ``(offset + weight)``; LayerNorm is arXiv 1607.06450.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm.reference._random import elementwise


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _none(x: Tensor) -> Tensor:
    """Stands for a gradient or an output that was not asked for."""
    return x.new_empty(0)


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In row order whatever strides came in: that is what the fakes of the schemas promise."""
    return x.to(dtype).contiguous()


def _own(x: Tensor, other: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As _dense, and never the other tensor itself: an op's results share no memory."""
    return _dense(x.clone() if x is other else x, dtype)


def _rms(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x already wide; wide result."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (offset + _wide(weight))


def _rms_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """Wide dx and dweight of _rms, all inputs wide but the weight."""
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    normed = x * rstd
    scaled = grad * (offset + _wide(weight))
    dx = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx, (grad * normed).sum(0)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x [M, N], weight [N] -> x / rms(x) * (offset + weight)."""
    return _dense(_rms(_wide(x), weight, eps, offset), x.dtype)


def rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """dx and dweight, those that needs[i] asks for."""
    dx, dw = _rms_backward(_wide(grad_out), _wide(x), weight, eps, offset)
    return (
        _dense(dx, x.dtype) if needs[0] else _none(x),
        dw.to(weight.dtype) if needs[1] else _none(weight),
    )


def residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """h = residual + tanh(gate) * RMS(x), and y = RMS'(h) where next_weight is given (else empty).

    x, residual [M, N]; gate one number; the norm after it reads h as stored, in its dtype.
    """
    branch = _rms(_wide(x), weight, eps, offset)
    if gate is not None:
        branch = torch.tanh(_wide(gate)).reshape(()) * branch
    h = _dense(_wide(residual) + branch, x.dtype)
    y = _none(x) if next_weight is None else rms_norm(h, next_weight, eps, offset)
    return h, y


def residual_rms_norm_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight, gate, next_weight, those that needs[i] asks for."""
    dh = torch.zeros_like(_wide(h)) if grad_h is None else _wide(grad_h)
    dnext = _none(x)
    if grad_y is not None and next_weight is not None:
        through, dn = _rms_backward(_wide(grad_y), _wide(h), next_weight, eps, offset)
        dh = dh + through
        if needs[4]:
            dnext = dn.to(next_weight.dtype)
    elif needs[4] and next_weight is not None:
        dnext = torch.zeros_like(next_weight)
    dgate, dbranch = _none(x), dh
    if gate is not None:
        t = torch.tanh(_wide(gate)).reshape(())
        if needs[3]:
            branch = _rms(_wide(x), weight, eps, offset)
            dgate = ((dh * branch).sum() * (1 - t * t)).to(gate.dtype).reshape(gate.shape)
        dbranch = dh * t
    dx, dw = _rms_backward(dbranch, _wide(x), weight, eps, offset)
    return (
        _dense(dx, x.dtype) if needs[0] else _none(x),
        _own(dh, grad_h, x.dtype) if needs[1] else _none(x),
        dw.to(weight.dtype) if needs[2] else _none(weight),
        dgate,
        dnext,
    )


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> Tensor:
    """LayerNorm(residual + dropout(x)): x, residual [M, N], weight, bias [N]."""
    z = _residual_sum(x, residual, seed, dropout_p)
    return F.layer_norm(z, z.shape[-1:], _wide(weight), _wide(bias), eps).to(x.dtype)


def residual_layer_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight, bias, those that needs[i] asks for."""
    z = _residual_sum(x, residual, seed, dropout_p)
    centred = z - z.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    normed = centred * rstd
    grad = _wide(grad_out)
    scaled = grad * _wide(weight)
    dz = scaled - scaled.mean(-1, keepdim=True)
    dz = rstd * (dz - normed * (scaled * normed).mean(-1, keepdim=True))
    dx = dz
    if seed is not None and dropout_p > 0:
        dx = dz * elementwise(seed, dz, dropout_p, dz.dtype)
    return (
        _dense(dx, x.dtype) if needs[0] else _none(x),
        _own(dz, dx, x.dtype) if needs[1] else _none(x),
        (grad * normed).sum(0).to(weight.dtype) if needs[2] else _none(weight),
        grad.sum(0).to(weight.dtype) if needs[3] else _none(weight),
    )


def _residual_sum(x: Tensor, residual: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    branch = _wide(x)
    if seed is not None and dropout_p > 0:
        branch = branch * elementwise(seed, branch, dropout_p, branch.dtype)
    return _wide(residual) + branch
