"""The ops of DaViT, the vision tower of Florence-2: maps whose channels lie together.

Where a gradient is wanted they run as plain PyTorch, which differentiates them to any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm import checks
from fastvlm.ops._autograd import autocasts, needs_grad
from fastvlm.ops.dispatch import define
from fastvlm.reference import vision as reference

_WINDOW_ATTENTION = define(
    "window_attention",
    "(Tensor qkv, Tensor? pad, int heads, int window, float scale) -> Tensor",
    reference.window_attention,
    lambda qkv, *rest: qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3),
)
_CHANNEL_ATTENTION = define(
    "channel_attention",
    "(Tensor qkv, int groups) -> Tensor",
    reference.channel_attention,
    lambda qkv, groups: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
)
_DEPTHWISE_CONV_NORM = define(
    "depthwise_conv_norm",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor norm_weight, Tensor norm_bias, float eps, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    reference.depthwise_conv_norm,
    lambda x, weight, bias, norm_weight, norm_bias, eps, dtype: (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=dtype),
    ),
)


def _whole(op: str, argument: str, value: object, divides: int | None = None) -> int:
    """A whole number above 0, one that divides a number where that is given."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise checks.fail(op, argument, "a whole number above 0", value)
    if divides is not None and divides % value:
        raise checks.fail(op, argument, f"a divisor of {divides} (a third of qkv's width)", value)
    return value


def _map(op: str, argument: str, x: Tensor, dims: int, text: str) -> None:
    checks.is_tensor(op, **{argument: x})
    checks.is_float(op, argument, x)
    if x.dim() != dims:
        raise checks.fail(op, argument, f"of shape {text}", x)


def _thirds(op: str, qkv: Tensor) -> int:
    if qkv.shape[-1] % 3 or qkv.shape[-1] == 0:
        raise checks.fail(op, "qkv", "of a width that is three times the channels", qkv)
    return qkv.shape[-1] // 3


def window_attention(
    qkv: Tensor, heads: int, window: int, *, pad: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention among the tokens of each window of a map (DaViT, arXiv 2204.03645).

    qkv: [B, H, W, 3 C], in each token q, k and v of C = heads * D channels, one head after the
    other: what one product of the map gives. window: the side of the windows that the map is cut
    into from its upper left corner. pad: [3 C], what qkv is in the rows that fill up a window past
    the map's edge (zeros for None); they take part in the softmax and are not computed one by one.
    scale: of the scores, D ** -0.5 for None.

    Returns [B, H, W, C] in qkv's dtype. Differentiable to any order, as plain PyTorch.
    Raises TypeError or ValueError; the message names the argument.
    """
    op = "window_attention"
    _map(op, "qkv", qkv, 4, "[images, height, width, 3 * channels]")
    channels = _thirds(op, qkv)
    heads = _whole(op, "heads", heads, channels)
    window = _whole(op, "window", window)
    if pad is not None:
        checks.is_tensor(op, pad=pad)
        checks.is_float(op, "pad", pad)
        checks.has_shape(op, "pad", pad, [3 * channels])
        checks.same_device(op, "qkv", qkv, pad=pad)
    scale = checks.scale_value(op, scale, channels // heads)
    run = reference.window_attention if needs_grad(qkv, pad) else _WINDOW_ATTENTION
    out: Tensor = run(qkv, pad, heads, window, scale)
    return out


def channel_attention(qkv: Tensor, groups: int) -> Tensor:
    """Attention between the channels of each group, over all tokens of an image (DaViT).

    qkv: [B, N, 3 C], in each token q, k and v of C = groups * D channels. The weights are
    softmax(q^T k / sqrt(N)) [D, D] of each group, over k's channels, and apply to those of v.

    Returns [B, N, C] in qkv's dtype. Scores are float32. Differentiable to any order, as plain
    PyTorch. Raises TypeError or ValueError; the message names the argument.
    """
    op = "channel_attention"
    _map(op, "qkv", qkv, 3, "[images, tokens, 3 * channels]")
    groups = _whole(op, "groups", groups, _thirds(op, qkv))
    run = reference.channel_attention if needs_grad(qkv) else _CHANNEL_ATTENTION
    out: Tensor = run(qkv, groups)
    return out


def depthwise_conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """h = x + conv(x) + bias and y = LayerNorm(h) over the channels, in one pass (DaViT).

    x: [B, H, W, C]. weight: [C, 1, 3, 3], one 3 x 3 filter for each channel, zeros around the map.
    bias: [C] or None. norm_weight, norm_bias: [C]. Weights are of any float dtype. LayerNorm:
    arXiv 1607.06450. dtype: of y, what the product behind it takes; None for x's, or autocast's
    where that is on.

    Returns h in x's dtype and y, both [B, H, W, C]. Computed in float32. Differentiable to any
    order, as plain PyTorch. Raises TypeError or ValueError; the message names the argument.
    """
    op = "depthwise_conv_norm"
    _map(op, "x", x, 4, "[images, height, width, channels]")
    channels = x.shape[3]
    shapes: dict[str, tuple[Tensor | None, list[int | None]]] = {
        "weight": (weight, [channels, 1, 3, 3]),
        "bias": (bias, [channels]),
        "norm_weight": (norm_weight, [channels]),
        "norm_bias": (norm_bias, [channels]),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None and name == "bias":
            continue
        checks.is_tensor(op, **{name: tensor})
        assert tensor is not None
        checks.is_float(op, name, tensor)
        checks.has_shape(op, name, tensor, shape)
        checks.same_device(op, "x", x, **{name: tensor})
    device = x.device.type
    if dtype is None:
        dtype = torch.get_autocast_dtype(device) if autocasts(device) else x.dtype
    elif not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise checks.fail(op, "dtype", "a float dtype", dtype)
    wants = needs_grad(x, weight, bias, norm_weight, norm_bias)
    run = reference.depthwise_conv_norm if wants else _DEPTHWISE_CONV_NORM
    h, y = run(x, weight.flatten(1), bias, norm_weight, norm_bias, eps, dtype)
    return h, y
