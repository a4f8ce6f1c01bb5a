"""Bad input is refused by a message that names the argument, what was given and what is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvlm import Layout, ops


def t(*shape: int, **kwargs: Any) -> Tensor:
    return torch.randn(*shape, **kwargs)


OWN = Layout.from_lengths([3])
LONGER = Layout.from_lengths([1, 2], [2, 1])
SWAPPED = Layout.from_lengths([1, 1, 1], [1, 1, 1], [0, 2, 1])
SHARED = Layout.from_lengths([1, 2], [3], [0, 0])
LABELS = torch.zeros(3, dtype=torch.int64)
LENGTHS = torch.ones(3, dtype=torch.int32)
BF16 = torch.bfloat16

X3 = (t(3, 4, 8), t(3, 2, 8), t(3, 2, 8))


def cross(q: Any = X3[0], k: Any = X3[1], v: Any = X3[2], layout: Any = OWN, **kwargs: Any) -> Any:
    return ops.cross_attention(q, k, v, layout, **kwargs)


def own(q: Any = X3[0], k: Any = X3[1], v: Any = X3[2], layout: Any = OWN, **kwargs: Any) -> Any:
    return ops.self_attention(q, k, v, layout, **kwargs)


def cached(
    q: Any = X3[0], k: Any = None, v: Any = None, lengths: Any = LENGTHS, **kwargs: Any
) -> Any:
    k = t(3, 5, 2, 8) if k is None else k
    return ops.cached_attention(q, k, t(3, 5, 2, 8) if v is None else v, lengths, **kwargs)


def gelu(x: Any = None, w1: Any = None, b1: Any = None, w2: Any = None, **kwargs: Any) -> Any:
    x = t(3, 5) if x is None else x
    w1 = t(6, 5) if w1 is None else w1
    return ops.gelu_mlp(x, w1, b1, t(4, 6) if w2 is None else w2, None, **kwargs)


def entropy(h: Any = None, weight: Any = None, labels: Any = LABELS, **kwargs: Any) -> Any:
    weight = t(9, 5) if weight is None else weight
    return ops.linear_cross_entropy(t(3, 5) if h is None else h, weight, labels, **kwargs)


def topk(k: Any = 2, **kwargs: Any) -> Any:
    return ops.linear_topk(t(3, 5), t(9, 5), k, **kwargs)


def rope(q: Any = X3[0], k: Any = X3[1], cos: Any = None, sin: Any = None) -> Any:
    cos = t(3, 8) if cos is None else cos
    return ops.rope(q, k, cos, t(*cos.shape) if sin is None else sin)


def tail(x: Any = None, residual: Any = None, weight: Any = None, **kwargs: Any) -> Any:
    x = t(3, 5) if x is None else x
    residual = t(3, 5) if residual is None else residual
    return ops.residual_rms_norm(x, residual, t(5) if weight is None else weight, **kwargs)


CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: cross(q=[1]), TypeError, r"cross_attention: q must be a torch.Tensor; got \[1\]"),
    (lambda: cross(layout=None), TypeError, "layout must be a Layout; got None"),
    (lambda: cross(q=X3[0].long()), ValueError, "q must be float32.*got a int64 tensor"),
    (lambda: cross(k=X3[1].to(BF16)), ValueError, r"k must be of the dtype of q \(float32\).*bfl"),
    (lambda: cross(v=X3[2].to("meta")), ValueError, r"v must be on the device of q \(cpu\)"),
    (lambda: cross(layout=OWN.to("meta")), ValueError, "layout must be on the device of q"),
    (lambda: cross(q=t(3, 8)), ValueError, r"q must be of shape \[tokens, heads, head_dim\]"),
    (lambda: cross(k=t(3, 2, 9)), ValueError, r"k must be of shape \[any, any, 8\]; .*3, 2, 9"),
    (lambda: cross(v=t(3, 4, 8)), ValueError, r"v must be of shape \[3, 2, any\]"),
    (lambda: cross(k=t(3, 3, 8), v=t(3, 3, 8)), ValueError, "k must be of a number of heads that"),
    (lambda: cross(q=t(4, 4, 8)), ValueError, "q must be of 3 rows, where layout's segments end"),
    (lambda: cross(k=t(4, 2, 8), v=t(4, 2, 8)), ValueError, "k must be of 3 rows, where layout's"),
    (lambda: cross(softcap=0.0), ValueError, "softcap must be a number above 0.*got 0.0"),
    (lambda: cross(softcap=-1), ValueError, "softcap must be a number above 0.*got -1"),
    (lambda: cross(softcap=float("nan")), ValueError, "softcap must be a number above 0"),
    (lambda: cross(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\); got 1.0"),
    (lambda: cross(dropout_p=-0.1), ValueError, r"dropout_p must be in \[0, 1\); got -0.1"),
    (lambda: cross(softcap="5"), ValueError, "softcap must be a number above 0.*got '5'"),
    (lambda: cross(dropout_p=None), ValueError, r"dropout_p must be in \[0, 1\); got None"),
    (lambda: cross(scale="1"), ValueError, r"cross_attention: scale must be a number.*got '1'"),
    (lambda: own(scale=t(1)), ValueError, "self_attention: scale must be a number.*got a float32"),
    (lambda: own(layout=SHARED), ValueError, "layout must be one whose segments read themselves"),
    (lambda: own(layout=LONGER), ValueError, "layout must be one whose segments read themselves"),
    (lambda: own(layout=SWAPPED), ValueError, "layout must be one whose segments read themselves"),
    (lambda: own(window=0), ValueError, "window must be a whole number above 0, or None; got 0"),
    (lambda: own(window=1.5), ValueError, "window must be a whole number above 0"),
    (lambda: own(softcap=0), ValueError, "self_attention: softcap must be"),
    (lambda: cached(lengths=[1]), TypeError, "lengths must be a torch.Tensor"),
    (lambda: cached(lengths=LENGTHS.float()), ValueError, "lengths must be int32 or int64"),
    (lambda: cached(lengths=LENGTHS[:2]), ValueError, r"lengths must be of shape \[3\]"),
    (lambda: cached(lengths=LENGTHS.to("meta")), ValueError, "lengths must be on the device of q"),
    (lambda: cached(k=t(3, 5, 2, 7)), ValueError, r"k_cache must be of shape .* 8\]"),
    (lambda: cached(v=t(3, 6, 2, 8)), ValueError, r"v_cache must be of shape \[3, 5, 2, any\]"),
    (lambda: cached(k=t(2, 5, 2, 8), v=t(2, 5, 2, 8)), ValueError, "k_cache must be of 3 rows or"),
    (lambda: cached(ancestry=torch.zeros(3, 4).int()), ValueError, r"ancestry must be .*\[3, 5\]"),
    (lambda: cached(ancestry=torch.zeros(3, 5)), ValueError, "ancestry must be int32 or int64"),
    (lambda: cached(ancestry=[[0]]), TypeError, r"ancestry must be a torch.Tensor; got \[\[0\]\]"),
    (lambda: cached(scale="1"), ValueError, "cached_attention: scale must be a number"),
    (lambda: cached(window=0), ValueError, "cached_attention: window must be a whole number"),
    (lambda: cached(softcap=0.0), ValueError, "cached_attention: softcap must be a number"),
    (lambda: cached(q=t(3, 8)), ValueError, r"q must be of shape \[rows, heads, head_dim\]"),
    (lambda: cached(q=X3[0].half()), ValueError, r"k_cache must be of the dtype of q \(float16\)"),
    (lambda: cached(k=t(3, 5, 3, 8), v=t(3, 5, 3, 8)), ValueError, "k_cache must be of a number"),
    (lambda: ops.linear("x", t(2, 2)), TypeError, "linear: x must be a torch.Tensor"),
    (lambda: ops.linear(torch.tensor(1.0), t(2, 2)), ValueError, r"x must be of shape \[..., fea"),
    (lambda: ops.linear(t(3, 5), t(4, 6)), ValueError, r"weight must be of shape \[any, 5\]"),
    (lambda: ops.linear(t(3, 5), t(4, 5), t(3)), ValueError, r"bias must be of shape \[4\]"),
    (lambda: ops.linear(t(3, 5), t(4, 5).to(BF16)), ValueError, "weight must be of the dtype of x"),
    (lambda: ops.linear(t(3, 5), None), TypeError, "weight must be a torch.Tensor; got None"),
    (
        lambda: ops.linear(t(3, 5, requires_grad=True), t(4, 5).to(BF16)),
        ValueError,
        "linear: weight must be of the dtype of x",
    ),
    (
        lambda: ops.linear(t(3, 5, requires_grad=True), t(4, 5, device="meta")),
        ValueError,
        "linear: weight must be on the device of x",
    ),
    (lambda: gelu(w1=[1]), TypeError, r"gelu_mlp: w1 must be a torch.Tensor; got \[1\]"),
    (lambda: gelu(w2=t(4, 6, device="meta")), ValueError, "w2 must be on the device of x"),
    (lambda: gelu(w1=t(6, 4)), ValueError, r"gelu_mlp: w1 must be of shape \[any, 5\]"),
    (lambda: gelu(b1=t(5)), ValueError, r"b1 must be of shape \[6\]; got .* \[5\]"),
    (lambda: gelu(w2=t(4, 7)), ValueError, r"w2 must be of shape \[any, 6\]"),
    (lambda: gelu(w2=t(4, 6).half()), ValueError, "w2 must be of the dtype of x"),
    (lambda: gelu(approximate="erf"), ValueError, "approximate must be one of 'none', 'tanh'"),
    (lambda: gelu(activation="swish"), ValueError, "activation must be one of 'gelu', 'gelu_tanh'"),
    (
        lambda: gelu(activation="relu", approximate="tanh"),
        ValueError,
        "approximate must be left out, or agree with activation='relu'",
    ),
    (lambda: gelu(dropout_p=2), ValueError, "dropout_p must be in"),
    (lambda: gelu(x=t(3, 5).int()), ValueError, "x must be float32"),
    (lambda: ops.geglu_mlp(t(3, 5), t(6, 5), t(7, 5), t(4, 6)), ValueError, "w_up must be of shap"),
    (lambda: ops.geglu_mlp(t(3, 5), t(6, 5), t(6, 5), t(4, 5)), ValueError, "w_down must be of"),
    (lambda: ops.rms_norm(t(3, 5), t(4)), ValueError, r"weight must be of shape \[5\]"),
    (lambda: ops.rms_norm(t(3, 5), t(5).long()), ValueError, "weight must be float32"),
    (lambda: ops.rms_norm(t(3, 5), t(5, device="meta")), ValueError, "weight must be on the dev"),
    (lambda: ops.rms_norm(None, t(5)), TypeError, "x must be a torch.Tensor; got None"),
    (lambda: ops.rms_norm(t(3, 5), None), TypeError, "weight must be a torch.Tensor; got None"),
    (
        lambda: ops.residual_layer_norm(t(3, 5), t(3, 5), t(5), None),
        TypeError,
        "residual_layer_norm: bias must be a torch.Tensor; got None",
    ),
    (
        lambda: ops.residual_rms_norm(t(3, 5), t(3, 5), None),
        TypeError,
        "residual_rms_norm: weight must be a torch.Tensor; got None",
    ),
    (lambda: tail(residual=t(2, 5)), ValueError, r"residual must be of shape \[3, 5\]"),
    (lambda: tail(residual=3), TypeError, "residual must be a torch.Tensor; got 3"),
    (lambda: tail(gate=t(2)), ValueError, r"gate must be one number, of shape \[\] or \[1\]"),
    (lambda: tail(gate=t(1, device="meta")), ValueError, "gate must be on the device of x"),
    (lambda: tail(gate=0.5), TypeError, "gate must be a torch.Tensor; got 0.5"),
    (lambda: tail(next_weight=t(4)), ValueError, r"next_weight must be of shape \[5\]"),
    (
        lambda: ops.residual_layer_norm(t(3, 5), t(3, 5), t(5), t(4)),
        ValueError,
        r"residual_layer_norm: bias must be of shape \[5\]",
    ),
    (
        lambda: ops.residual_layer_norm(t(3, 5), t(3, 5), t(5), t(5), dropout_p=1),
        ValueError,
        "dropout_p must be in",
    ),
    (lambda: rope(q=t(3, 8)), ValueError, "rope: q must be of shape"),
    (lambda: rope(k=t(4, 2, 8)), ValueError, r"k must be of shape \[3, any, 8\]"),
    (lambda: rope(cos=t(4, 8)), ValueError, r"cos must be of shape \[3, any\]"),
    (lambda: rope(cos=t(3, 7)), ValueError, "cos must be of an even width of at most 8"),
    (lambda: rope(cos=t(3, 10)), ValueError, "cos must be of an even width of at most 8"),
    (lambda: rope(sin=t(3, 6)), ValueError, r"sin must be of shape \[3, 8\]"),
    (lambda: rope(cos=t(3, 8, requires_grad=True)), ValueError, "cos must be a constant"),
    (lambda: entropy(h=t(3, 5, 1)), ValueError, r"h must be of shape \[rows, features\]"),
    (lambda: entropy(weight=t(9, 4)), ValueError, r"weight must be of shape \[any, 5\]"),
    (lambda: entropy(labels=LABELS.int()), ValueError, "labels must be int64; got a int32"),
    (lambda: entropy(labels=LABELS[:2]), ValueError, r"labels must be of shape \[3\]"),
    (lambda: entropy(bias=t(8)), ValueError, r"bias must be of shape \[9\]"),
    (lambda: entropy(softcap=-30), ValueError, "softcap must be a number above 0"),
    (lambda: entropy(reduction="avg"), ValueError, "reduction must be one of 'mean', 'sum'"),
    (lambda: entropy(groups=LABELS), ValueError, "num_groups must be given together with groups"),
    (lambda: entropy(groups=LABELS.int(), num_groups=2), ValueError, "groups must be int64"),
    (lambda: entropy(groups=[0, 1, 0], num_groups=2), TypeError, "groups must be a torch.Tensor"),
    (lambda: entropy(groups=LABELS[:2], num_groups=2), ValueError, r"groups must be of shape \[3"),
    (
        lambda: entropy(groups=LABELS.to("meta"), num_groups=2),
        ValueError,
        "groups must be on the device of h",
    ),
    (lambda: entropy(skip_tiny_gradients=1.0), ValueError, "skip_tiny_gradients must be True, Fal"),
    (lambda: entropy(skip_tiny_gradients=-0.1), ValueError, r"a number in \[0, 1\); got -0.1"),
    (lambda: entropy(skip_tiny_gradients=float("nan")), ValueError, "skip_tiny_gradients must be"),
    (lambda: entropy(skip_tiny_gradients="auto"), ValueError, "skip_tiny_gradients.*got 'auto'"),
    (lambda: entropy(skip_tiny_gradients=None), ValueError, "skip_tiny_gradients.*got None"),
    (lambda: entropy(labels=[0, 1, 2]), TypeError, "labels must be a torch.Tensor; got"),
    (lambda: entropy(labels=LABELS.to("meta")), ValueError, "labels must be on the device of h"),
    (lambda: entropy(weight=t(9, 5).half()), ValueError, "weight must be of the dtype of h"),
    (lambda: entropy(bias=t(9, device="meta")), ValueError, "bias must be on the device of h"),
    (lambda: topk(bias=t(9).half()), ValueError, "linear_topk: bias must be of the dtype of h"),
    (lambda: topk(2.0), ValueError, r"k must be in \[1, 9\].*got 2.0"),
    (lambda: entropy(groups=LABELS, num_groups=0), ValueError, "num_groups must be a whole number"),
    (lambda: topk(0), ValueError, r"k must be in \[1, 9\] \(the vocabulary\); got 0"),
    (lambda: topk(10), ValueError, r"k must be in \[1, 9\]"),
    (lambda: topk(softcap=0.0), ValueError, "linear_topk: softcap must be"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[2][:40])
def test_refused(case: tuple[Callable[[], Any], type[Exception], str]) -> None:
    make, kind, message = case
    with pytest.raises(kind, match=message):
        make()
