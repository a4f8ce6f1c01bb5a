"""Products in int8 arithmetic, for inference with many rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm import checks
from fastvlm.ops._activation import number_of
from fastvlm.ops._autograd import needs_grad
from fastvlm.ops.dispatch import define
from fastvlm.ops.mlp import rows_of
from fastvlm.reference import int8 as reference

_INT8_LINEAR = define(
    "int8_linear",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, Tensor? factors) "
    "-> Tensor",
    reference.int8_linear,
    lambda x, weight, scale, bias, residual, factors: (
        x if residual is None else residual
    ).new_empty(x.shape[0], weight.shape[0]),
)
_INT8_GELU_MLP = define(
    "int8_gelu_mlp",
    "(Tensor x, Tensor w1, Tensor scale1, Tensor? b1, Tensor w2, Tensor scale2, Tensor? b2, "
    "Tensor? residual, Tensor? factors, int activation) -> Tensor",
    reference.int8_gelu_mlp,
    lambda x, w1, scale1, b1, w2, scale2, b2, residual, factors, activation: (
        x if residual is None else residual
    ).new_empty(x.shape[0], w2.shape[0]),
)


def _names(weight: str) -> tuple[str, str]:
    """Of a weight's factors and bias: `scale` or `scale` and the weight's number, and so on."""
    number = weight.removeprefix("w") if weight != "weight" else ""
    return f"scale{number}", f"b{number}" if number else "bias"


def _weight(
    op: str, name: str, weight: Tensor, scale: Tensor | None, cols: int, bias: Tensor | None
) -> None:
    """A weight's shape, its factors where it has some, and the bias of the same number."""
    scale_name, bias_name = _names(name)
    checks.has_shape(op, name, weight, [None, cols])
    if scale is not None:
        checks.is_tensor(op, **{scale_name: scale})
        checks.has_shape(op, scale_name, scale, [weight.shape[0]])
        if scale.dtype != torch.float32:
            raise checks.fail(op, scale_name, "float32", scale)
    if bias is not None:
        checks.is_tensor(op, **{bias_name: bias})
        checks.is_float(op, bias_name, bias)
        checks.has_shape(op, bias_name, bias, [weight.shape[0]])


def _of_int8(
    op: str, name: str, weight: Tensor, scale: Tensor, cols: int, bias: Tensor | None
) -> None:
    checks.is_tensor(op, **{name: weight, _names(name)[0]: scale})
    checks.has_shape(op, name, weight, [None, cols])
    if weight.dtype != torch.int8:
        raise checks.fail(op, name, "int8 (fastvlm.ops.quantize_rows makes it)", weight)
    _weight(op, name, weight, scale, cols, bias)


def _rows(
    op: str, x: Tensor, residual: Tensor | None, factors: Tensor | None, out: int | None
) -> tuple[Tensor, Tensor | None]:
    checks.is_tensor(op, x=x)
    checks.is_float(op, "x", x)
    if x.dim() == 0:
        raise checks.fail(op, "x", "of shape [..., features]", x)
    rows = rows_of(x)
    if residual is not None:
        checks.is_tensor(op, residual=residual)
        checks.is_float(op, "residual", residual)
        checks.has_shape(op, "residual", residual, [*x.shape[:-1], out])
        residual = rows_of(residual)
    if factors is not None:
        checks.is_tensor(op, factors=factors)
        if factors.dtype != torch.float32 or factors.dim() != 1:
            raise checks.fail(op, "factors", "float32 of shape [groups of rows]", factors)
        if factors.shape[0] == 0 or rows.shape[0] % factors.shape[0]:
            wanted = f"of a number that divides the {rows.shape[0]} rows"
            raise checks.fail(op, "factors", wanted, factors)
    return rows, residual


def _for_inference(op: str, x: Tensor, **others: Tensor | None) -> None:
    checks.same_device(op, "x", x, **others)
    for name, tensor in {"x": x, **others}.items():
        if needs_grad(tensor):
            raise RuntimeError(
                f"fastvlm.{op}: {name} must not want a gradient: this op is for inference; call it "
                "under torch.inference_mode() or torch.no_grad()"
            )


def _height(weight: object) -> int | None:
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    factors: Tensor | None = None,
) -> Tensor:
    """x weight^T + bias in int8 arithmetic, or residual + factor * that.

    x: [..., K] float32, bfloat16 or float16; each row is quantized at run time, in groups of 64
    neighbours, to int8 with a factor max |x| / 127 each. weight: [N, K] int8, scale: [N] float32
    (`quantize_rows` makes both). bias: [N] of any float dtype, or None. residual: [..., N] of any
    float dtype, or None. factors: [G] float32, one for each of G groups of neighbouring rows of
    equal size, or None for 1.

    Products and their sums over a group are exact integers; the rest is float32. Returns [..., N]
    in residual's dtype, or else x's. A row with a NaN or an infinity gives NaN, and one with an
    element above 1e33 may give an infinity: sums meet the weight's factors last. For many rows:
    `low_precision_linear` streams the weight for few. Inference only; autocast does not change x.

    Raises TypeError or ValueError, and RuntimeError where a gradient is wanted; the message names
    the argument.
    """
    op = "int8_linear"
    rows, to = _rows(op, x, residual, factors, _height(weight))
    _of_int8(op, "weight", weight, scale, x.shape[-1], bias)
    _for_inference(op, x, weight=weight, scale=scale, bias=bias, residual=residual, factors=factors)
    out: Tensor = _INT8_LINEAR(rows, weight, scale, bias, to, factors)
    return out.view(*x.shape[:-1], weight.shape[0])


def int8_gelu_mlp(
    x: Tensor,
    w1: Tensor,
    scale1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    scale2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None = None,
    *,
    activation: str = "gelu",
    approximate: str | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """activation(x w1^T + b1) w2^T + b2 in int8 arithmetic, or residual + factor * that.

    x: [..., K], quantized as in `int8_linear`, and so is what lies between the products, which is
    float32. w1: [F, K] int8, scale1: [F] float32, b1: [F] or None; w2: [N, F] int8, scale2: [N],
    b2: [N] or None. activation, approximate: as in `gelu_mlp`. residual, factors, what is
    returned and raised: as in `int8_linear`.
    """
    op = "int8_gelu_mlp"
    rows, to = _rows(op, x, residual, factors, _height(w2))
    _of_int8(op, "w1", w1, scale1, x.shape[-1], b1)
    _of_int8(op, "w2", w2, scale2, w1.shape[0], b2)
    number = number_of(op, activation, approximate, "gelu")
    _for_inference(
        *(op, x), w1=w1, scale1=scale1, b1=b1, w2=w2, scale2=scale2, b2=b2,
        residual=residual, factors=factors,
    )  # fmt: skip
    out: Tensor = _INT8_GELU_MLP(*(rows, w1, scale1, b1, w2, scale2, b2, to, factors, number))
    return out.view(*x.shape[:-1], w2.shape[0])
