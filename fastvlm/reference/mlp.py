"""The decoder MLPs and the linear projection, in plain PyTorch.

GELU is ``x * Phi(x)`` with the exact error function (BART, Florence-2) or its tanh form (Gemma-2),
arXiv 1606.08415; SiLU is ``x * sigmoid(x)``; GeGLU and SwiGLU are arXiv 2002.05202. The activation
is computed in float32. Schemas take its number: its place in ACTIVATIONS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm.reference._random import elementwise

# in the order of Activation in csrc/cpu/kernels.h
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
ACTIVATIONS = tuple(FUNCTIONS)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def activated(x: Tensor, activation: int) -> Tensor:
    """The activation of a number, in the dtype of x."""
    return FUNCTIONS[ACTIVATIONS[activation]](x)


def _none(x: Tensor) -> Tensor:
    """Stands for a gradient that was not asked for: schemas cannot return None."""
    return x.new_empty(0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K], weight [N, K], bias [N] -> [M, N]."""
    return F.linear(x, weight.to(x.dtype), bias)


def low_precision_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x [M, K], weight bfloat16 or int8 [N, K], scale of its rows [N], bias [N] -> [M, N].

    The weight is widened some rows at a time: a whole head of float32 would be gigabytes.
    """
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    wide = _wide(x)
    out = x.new_empty(x.shape[0], weight.shape[0])
    for rows in row_blocks(weight):
        part = F.linear(wide, weight[rows].to(wide.dtype))
        if scale is not None:
            part *= scale[rows]
        if bias is not None:
            part += bias[rows]
        out[:, rows] = part
    return out


def low_precision_hidden(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    up: Tensor | None,
    up_scale: Tensor | None,
    activation: int,
) -> Tensor:
    """activation(x weight^T + bias) [M, F], times x up^T where there is an up.

    By the ops that serve its parts, whatever the backend, where no kernel does all of it.
    """
    product = torch.ops.fastvlm.low_precision_linear
    hidden = activated(product(x, weight, scale, bias), activation)
    return hidden if up is None else hidden * product(x, up, up_scale, None)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> int8 [N, K] and the float32 factor [N] of each row, max |w| / 127."""
    stored = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale = weight.new_empty(weight.shape[0], dtype=torch.float32)
    for rows in row_blocks(weight):
        block = weight[rows].float()
        largest = block.abs().amax(1) if block.shape[1] else block.new_zeros(block.shape[0])
        # a row of zeros stays one whatever its factor; at least the smallest normal number, since
        # some CPUs are set to take a smaller one for 0
        factor = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
        stored[rows] = (block / factor[:, None]).round().clamp(-127, 127).to(torch.int8)
        scale[rows] = factor
    return stored, scale


_BLOCK = 2**22  # elements in float32 at a time


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of a weight, each of a bounded number of elements."""
    step = max(1, _BLOCK // max(1, weight.shape[1]))
    for begin in range(0, weight.shape[0], step):
        yield slice(begin, begin + step)


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    activation: int,
    dropout_p: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """dropout(activation(x w1^T + b1)) w2^T + b2: x [M, K], w1 [F, K], w2 [N, F] -> [M, N].

    Also x w1^T + b1 [M, F] where keep is set (else empty): what backward starts from.
    """
    pre = F.linear(x, w1, b1)
    hidden = activated(_wide(pre), activation)
    if seed is not None and dropout_p > 0:
        hidden = hidden * elementwise(seed, hidden, dropout_p, hidden.dtype)
    return F.linear(hidden.to(x.dtype), w2, b2), pre if keep else _none(x)


def gelu_mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    pre: Tensor,
    w1: Tensor,
    w2: Tensor,
    seed: Tensor | None,
    activation: int,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2, b2, those that needs[i] asks for; recomputes the activation."""
    wide = _wide(pre)
    dropped = None
    if seed is not None and dropout_p > 0:
        dropped = elementwise(seed, wide, dropout_p, wide.dtype)
    dw2 = _none(x)
    if needs[3]:
        act = activated(wide, activation)
        dw2 = grad_out.t() @ (act if dropped is None else act * dropped).to(x.dtype)
    db2 = _wide(grad_out).sum(0).to(x.dtype) if needs[4] else _none(x)
    if not any(needs[:3]):
        return _none(x), _none(x), _none(x), dw2, db2
    dhidden = _wide(grad_out @ w2)
    if dropped is not None:
        dhidden = dhidden * dropped
    dpre = _activation_backward(dhidden, wide, activation)
    narrow = dpre.to(x.dtype)
    return (
        narrow @ w1 if needs[0] else _none(x),
        narrow.t() @ x if needs[1] else _none(x),
        dpre.sum(0).to(x.dtype) if needs[2] else _none(x),
        dw2,
        db2,
    )


def geglu_mlp(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(activation(x w_gate^T) * x w_up^T) w_down^T [M, N]: x [M, K], gate, up [F, K], down [N, F].

    Also x w_gate^T and x w_up^T [M, F] where keep is set (else empty): what backward starts from.
    """
    gate, up = F.linear(x, w_gate), F.linear(x, w_up)
    hidden = activated(_wide(gate), activation) * _wide(up)
    out = F.linear(hidden.to(x.dtype), w_down)
    return (out, gate, up) if keep else (out, _none(x), _none(x))


def geglu_mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_gate, w_up, w_down, those that needs[i] asks for."""
    wide_gate, wide_up = _wide(gate), _wide(up)
    act = activated(wide_gate, activation)
    ddown = grad_out.t() @ (act * wide_up).to(x.dtype) if needs[3] else _none(x)
    if not any(needs[:3]):
        return _none(x), _none(x), _none(x), ddown
    dhidden = _wide(grad_out @ w_down)
    dup = (dhidden * act).to(x.dtype)
    dgate = _activation_backward(dhidden * wide_up, wide_gate, activation).to(x.dtype)
    return (
        dgate @ w_gate + dup @ w_up if needs[0] else _none(x),
        dgate.t() @ x if needs[1] else _none(x),
        dup.t() @ x if needs[2] else _none(x),
        ddown,
    )


def _activation_backward(grad: Tensor, x: Tensor, activation: int) -> Tensor:
    """The gradient of x from that of activated(x); ReLU's at 0 is 0, as in PyTorch."""
    match ACTIVATIONS[activation]:
        case "relu":
            return torch.ops.aten.threshold_backward(grad, x, 0)
        case "silu":
            return torch.ops.aten.silu_backward(grad, x)
        case name:
            approximate = "tanh" if name == "gelu_tanh" else "none"
            return torch.ops.aten.gelu_backward(grad, x, approximate=approximate)
