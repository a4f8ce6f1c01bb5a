"""Launchers of csrc/cpu/mlp.cpp and activation.cpp, with the products between them.

A few rows without a backward pass stream each weight once, in one kernel for the whole MLP. More
rows without one go through both products in blocks that stay in cache; training, or a library, is
products (`gemm.product`) with one pass for the activation between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm.cpu.common import dense_bias, dense_last, unavailable, wrong_dtype
from fastvlm.cpu.gemm import MAX_ROWS, added_product, packed_mlp, packs, product, streams
from fastvlm.ops.dispatch import Kernel


def _sum_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.sum(0, dtype=torch.float32).to(dtype)


def _none(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight, bias)


def _low_precision_unsupported(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None
) -> str | None:
    if weight.dtype != x.dtype and x.shape[0] > MAX_ROWS:
        return f"{x.shape[0]} rows: widening the weight for PyTorch's product pays above {MAX_ROWS}"
    if weight.stride(-1) != 1 or (scale is not None and not scale.is_contiguous()):
        return "a weight or scale that is not contiguous"
    return wrong_dtype(x)


def _low_precision_linear(x: Tensor, weight: Tensor, scale: Any, bias: Any) -> Tensor:
    if weight.dtype == x.dtype:
        return product(x, weight, bias)
    return torch.ops.fastvlm_cpu.low_precision_linear(
        dense_last(x), weight, scale, dense_bias(bias)
    )


def _low_precision_hidden(
    x: Tensor, weight: Tensor, scale: Any, bias: Any, up: Any, up_scale: Any, activation: int
) -> Tensor:
    pre = _low_precision_linear(x, weight, scale, bias)
    gate = None if up is None else _low_precision_linear(x, up, up_scale, None)
    return torch.ops.fastvlm_cpu.activate(pre, gate, None, activation, 0.0)


def _low_precision_hidden_unsupported(
    x: Tensor, weight: Tensor, scale: Any, bias: Any, up: Any, up_scale: Any, activation: int
) -> str | None:
    why = _low_precision_unsupported(x, weight, scale, bias)
    return why or (None if up is None else _low_precision_unsupported(x, up, up_scale, None))


def _gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Any,
    w2: Tensor,
    b2: Any,
    seed: Any,
    activation: int,
    p: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    if not keep and seed is None and streams(x, w1, w2):
        b1, b2 = dense_bias(b1), dense_bias(b2)
        y = torch.ops.fastvlm_cpu.gelu_mlp(dense_last(x), w1, b1, w2, b2, activation)
        return y, _none(x)
    if not keep and seed is None and packs(x, w1, w2):
        return packed_mlp(x, w1, b1, w2, b2, None, None, activation), _none(x)
    pre = product(x, w1, b1)
    y = product(torch.ops.fastvlm_cpu.activate(pre, None, seed, activation, p), w2, b2)
    return y, pre if keep else _none(x)


def _gelu_mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    pre: Tensor,
    w1: Tensor,
    w2: Tensor,
    seed: Tensor | None,
    activation: int,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    inputs = any(needs[:3])
    grad = product(grad_out, w2.t()) if inputs else torch.empty_like(pre)
    dpre, _, hidden = torch.ops.fastvlm_cpu.activate_backward(
        grad.contiguous(), pre.contiguous(), None, seed, activation, dropout_p, inputs, needs[3]
    )
    return (
        product(dpre, w1.t()) if needs[0] else _none(x),
        product(dpre.t(), x.t()) if needs[1] else _none(x),
        _sum_rows(dpre, x.dtype) if needs[2] else _none(x),
        product(grad_out.t(), hidden.t()) if needs[3] else _none(x),
        _sum_rows(grad_out, x.dtype) if needs[4] else _none(x),
    )


def _geglu_mlp(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not keep and streams(x, w_gate, w_up, w_down):
        y = torch.ops.fastvlm_cpu.geglu_mlp(dense_last(x), w_gate, w_up, w_down, activation)
        return y, _none(x), _none(x)
    gate, up = product(x, w_gate), product(x, w_up)
    y = product(torch.ops.fastvlm_cpu.activate(gate, up, None, activation, 0.0), w_down)
    return (y, gate, up) if keep else (y, _none(x), _none(x))


def _geglu_mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    inputs = any(needs[:3])
    grad = product(grad_out, w_down.t()) if inputs else torch.empty_like(gate)
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup, hidden = torch.ops.fastvlm_cpu.activate_backward(
        grad, gate, up, None, activation, 0.0, inputs, needs[3]
    )
    dx = _none(x)
    if needs[0]:
        dx = product(dgate, w_gate.t())
        dx = added_product(dx, dup, w_up.t())
    return (
        dx,
        product(dgate.t(), x.t()) if needs[1] else _none(x),
        product(dup.t(), x.t()) if needs[2] else _none(x),
        product(grad_out.t(), hidden.t()) if needs[3] else _none(x),
    )


def _kernel(run: Any) -> Kernel:
    return Kernel("cpu", run, unavailable, lambda x, *rest: wrong_dtype(x))


KERNELS = {
    "linear": _kernel(_linear),
    "low_precision_linear": Kernel(
        "cpu", _low_precision_linear, unavailable, _low_precision_unsupported
    ),
    "low_precision_hidden": Kernel(
        "cpu", _low_precision_hidden, unavailable, _low_precision_hidden_unsupported
    ),
    "gelu_mlp": _kernel(_gelu_mlp),
    "gelu_mlp_backward": _kernel(_gelu_mlp_backward),
    "geglu_mlp": _kernel(_geglu_mlp),
    "geglu_mlp_backward": _kernel(_geglu_mlp_backward),
}
