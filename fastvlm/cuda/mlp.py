"""Launchers of csrc/cuda/mlp.cu: the products of a decoding step, 1 to 16 rows.

act(x w_gate^T) * (x w_up^T)    both weights by one launch, then the down projection
act(x w1^T + b1)                then the second product with its bias
x w^T, w in x's dtype or int8   with a scale for each row, and with both of the activations
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm.triton.common import Launcher, cdiv, dense_last, is_tanh, multiprocessors, not_gelu

# kMostRows, kColumns and kMostParts of csrc/cuda/mlp.h
MOST_ROWS, COLUMNS, MOST_SPLITS = 16, 8, 16
# bytes of a weight's row that the eight warps of a block read in one step
STEP_BYTES = 8 * 64
DTYPES = (torch.bfloat16, torch.float16)
_NONE, _ERF, _TANH = range(3)


def _kind(activation: int) -> int:
    return _TANH if is_tanh(activation) else _ERF


def _vector(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """Kernels read vectors of float32 or of the dtype of x."""
    if bias is None:
        return None
    return dense_last(bias if bias.dtype in (torch.float32, x.dtype) else bias.float())


def _splits(x: Tensor, weight: Tensor) -> int:
    """Parts of the depth until there are two blocks for every multiprocessor, each with a step for
    every warp."""
    columns, depth = weight.shape
    wanted = cdiv(2 * multiprocessors(x), max(1, cdiv(columns, COLUMNS)))
    steps = depth * weight.element_size() // STEP_BYTES
    return max(1, min(wanted, steps, MOST_SPLITS))


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: int = _NONE
) -> Tensor:
    return torch.ops.fastvlm_cuda.few_rows_linear(
        x, dense_last(weight), None, _vector(bias, x), activation, _splits(x, weight)
    )


def _geglu_mlp(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.ops.fastvlm_cuda.few_rows_gated(
        dense_last(x), dense_last(w_gate), dense_last(w_up), None, None, _kind(activation),
        _splits(x, w_gate),
    )  # fmt: skip
    return _linear(hidden, w_down), x.new_empty(0), x.new_empty(0)


def _gelu_mlp(
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
    hidden = _linear(dense_last(x), w1, b1, _kind(activation))
    return _linear(hidden, w2, b2), x.new_empty(0)


def _low_precision_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    if scale is not None:
        scale = dense_last(scale.float())
    return torch.ops.fastvlm_cuda.few_rows_linear(
        dense_last(x), dense_last(weight), scale, _vector(bias, x), _NONE, _splits(x, weight)
    )


def _low_precision_hidden(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    up: Tensor | None,
    up_scale: Tensor | None,
    activation: int,
) -> Tensor:
    x, weight, kind = dense_last(x), dense_last(weight), _kind(activation)
    scale, up_scale = (None if s is None else dense_last(s.float()) for s in (scale, up_scale))
    splits = _splits(x, weight)
    if up is None:
        return torch.ops.fastvlm_cuda.few_rows_linear(
            x, weight, scale, _vector(bias, x), kind, splits
        )
    return torch.ops.fastvlm_cuda.few_rows_gated(
        x, weight, dense_last(up), scale, up_scale, kind, splits
    )


def misfit(x: Tensor, most_rows: int, **weights: Tensor) -> str | None:
    """Why the kernels cannot multiply x by these weights."""
    if x.dtype not in DTYPES:
        return f"{x.dtype} (it has bfloat16 and float16)"
    if x.shape[0] > most_rows:
        return f"{x.shape[0]} rows (it has up to {most_rows})"
    for name, w in {"x": x, **weights}.items():
        if w.dtype not in (x.dtype, torch.int8):
            return f"{name} in {w.dtype} where x is in {x.dtype}"
        size = w.element_size()
        ragged = w.shape[1] * size % 16 != 0
        if w.stride(1) == 1 and w.shape[0] > 1:
            ragged = ragged or w.stride(0) * size % 16 != 0
        if ragged or (w.stride(1) == 1 and w.data_ptr() % 16):
            return f"rows of {name} that do not begin at multiples of 16 bytes"
    return None


def _unsupported_geglu(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: int, keep: bool
) -> str | None:
    if keep:
        return "training: what a backward needs is not kept"
    return not_gelu(activation) or misfit(x, MOST_ROWS, w_gate=w_gate, w_up=w_up, w_down=w_down)


def _unsupported_gelu(
    x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, *rest: Any
) -> str | None:
    _, activation, dropout_p, keep = rest
    if keep or dropout_p > 0:
        return "training: what a backward needs is not kept"
    return not_gelu(activation) or misfit(x, MOST_ROWS, w1=w1, w2=w2)


def _unsupported_hidden(
    x: Tensor, weight: Tensor, scale: Any, bias: Any, up: Tensor | None, *rest: Any
) -> str | None:
    if (why := not_gelu(rest[-1])) is not None:
        return why
    if up is None:
        return misfit(x, MOST_ROWS, weight=weight)
    if bias is not None:
        return "a bias of the gate"
    if up.dtype != weight.dtype:
        return f"up in {up.dtype} where the gate is in {weight.dtype}"
    return misfit(x, MOST_ROWS, weight=weight, up=up)


def _unsupported_linear(x: Tensor, weight: Tensor, *rest: Any) -> str | None:
    return misfit(x, MOST_ROWS, weight=weight)


LAUNCHERS = {
    "geglu_mlp": Launcher(_geglu_mlp, _unsupported_geglu),
    "gelu_mlp": Launcher(_gelu_mlp, _unsupported_gelu),
    "low_precision_linear": Launcher(_low_precision_linear, _unsupported_linear),
    "low_precision_hidden": Launcher(_low_precision_hidden, _unsupported_hidden),
}
