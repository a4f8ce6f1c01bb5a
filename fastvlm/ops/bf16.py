"""Products in bfloat16 arithmetic of x of any float dtype, for inference with many rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm import checks
from fastvlm.ops._activation import number_of
from fastvlm.ops.dispatch import define
from fastvlm.ops.int8 import _for_inference, _height, _names, _rows, _weight
from fastvlm.reference import bf16 as reference

_BF16_LINEAR = define(
    "bf16_linear",
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, Tensor? factors) "
    "-> Tensor",
    reference.bf16_linear,
    lambda x, weight, scale, bias, residual, factors: (
        x if residual is None else residual
    ).new_empty(x.shape[0], weight.shape[0]),
)
_BF16_GELU_MLP = define(
    "bf16_gelu_mlp",
    "(Tensor x, Tensor w1, Tensor? scale1, Tensor? b1, Tensor w2, Tensor? scale2, Tensor? b2, "
    "Tensor? residual, Tensor? factors, int activation) -> Tensor",
    reference.bf16_gelu_mlp,
    lambda x, w1, scale1, b1, w2, scale2, b2, residual, factors, activation: (
        x if residual is None else residual
    ).new_empty(x.shape[0], w2.shape[0]),
)


def _either(
    op: str, name: str, weight: Tensor, scale: Tensor | None, cols: int, bias: Tensor | None
) -> None:
    """A weight of bfloat16, or of int8 with its factors."""
    checks.is_tensor(op, **{name: weight})
    if weight.dtype != torch.bfloat16 and (scale is None or weight.dtype != torch.int8):
        wanted = "bfloat16, or int8 with its scale (fastvlm.ops.quantize_rows makes both)"
        raise checks.fail(op, name, wanted, weight)
    if weight.dtype == torch.bfloat16 and scale is not None:
        raise checks.fail(op, _names(name)[0], "None for a weight of bfloat16", scale)
    _weight(op, name, weight, scale, cols, bias)


def bf16_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    factors: Tensor | None = None,
) -> Tensor:
    """x weight^T + bias in bfloat16 arithmetic, or residual + factor * that.

    x: [..., K] float32, bfloat16 or float16, rounded to bfloat16. weight: [N, K] bfloat16, scale:
    None; or [N, K] int8 with scale [N] float32 (`quantize_rows` makes both), which is exact in
    bfloat16. bias: [N] of any float dtype, or None. residual: [..., N] of any float dtype, or
    None. factors: [G] float32, one for each of G groups of neighbouring rows of equal size, or None
    for 1.

    Products are exact and their sums float32; the CPU's own instructions take numbers below 1e-38
    for zeros. Returns [..., N] in residual's dtype, or else x's. For many rows:
    `low_precision_linear` streams the weight for few. Inference only; autocast does not change x.

    Raises TypeError or ValueError, and RuntimeError where a gradient is wanted; the message names
    the argument.
    """
    op = "bf16_linear"
    rows, to = _rows(op, x, residual, factors, _height(weight))
    _either(op, "weight", weight, scale, x.shape[-1], bias)
    _for_inference(op, x, weight=weight, scale=scale, bias=bias, residual=residual, factors=factors)
    out: Tensor = _BF16_LINEAR(rows, weight, scale, bias, to, factors)
    return out.view(*x.shape[:-1], weight.shape[0])


def bf16_gelu_mlp(
    x: Tensor,
    w1: Tensor,
    scale1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    scale2: Tensor | None,
    b2: Tensor | None,
    residual: Tensor | None = None,
    *,
    activation: str = "gelu",
    approximate: str | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """activation(x w1^T + b1) w2^T + b2 in bfloat16 arithmetic, or residual + factor * that.

    x: [..., K], rounded as in `bf16_linear`, and so is what lies between the products. w1: [F, K],
    scale1, b1: [F] or None; w2: [N, F], scale2, b2: [N] or None; weights and their scales as in
    `bf16_linear`. activation, approximate: as in `gelu_mlp`. residual, factors, what is returned
    and raised: as in `bf16_linear`.
    """
    op = "bf16_gelu_mlp"
    rows, to = _rows(op, x, residual, factors, _height(w2))
    _either(op, "w1", w1, scale1, x.shape[-1], b1)
    _either(op, "w2", w2, scale2, w1.shape[0], b2)
    number = number_of(op, activation, approximate, "gelu")
    _for_inference(
        *(op, x), w1=w1, scale1=scale1, b1=b1, w2=w2, scale2=scale2, b2=b2,
        residual=residual, factors=factors,
    )  # fmt: skip
    out: Tensor = _BF16_GELU_MLP(*(rows, w1, scale1, b1, w2, scale2, b2, to, factors, number))
    return out.view(*x.shape[:-1], w2.shape[0])
