"""The two halves of a DaViT block, from map to map in one layout, without a copy between.

The channels of a map lie together from the patch embedding on. A half is five passes: convolution,
residual and norm; qkv; attention, which reads q, k and v where the product has left them; the
projection with its residual; the MLP with its residual, after a second convolution. Where a part is
listened to (a hook), wrapped (an adapter) or wants gradients, the half runs as transformers wrote
it, on the patched parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvlm import ops
from fastvlm.cpu.common import DTYPES, unavailable
from fastvlm.models.structure import extra_parts, takes
from fastvlm.nn.linear import DENSE, is_bare, is_plain
from fastvlm.nn.mlp import activation_of, computes, is_known, kind_of
from fastvlm.ops import dispatch
from fastvlm.ops._autograd import autocasts, needs_grad
from fastvlm.ops.mlp import _transformed
from fastvlm.patching.foreign import as_written
from fastvlm.patching.rules import Swap
from fastvlm.run.mixin import Mixin

_STOCHASTIC_DEPTH = "Florence2DropPath"
_PARTS = ("conv1", "norm1", "drop_path1", "conv2", "norm2", "ffn", "drop_path2")


class _Half(Mixin):
    activation = "gelu"
    evaluated = ""
    attention = ""  # the name of the attention module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, C, H, W] -> the same, its channels together in memory."""
        if not self._fuses(hidden_states):
            out: Tensor = super().forward(hidden_states)
            return out
        x = hidden_states.permute(0, 2, 3, 1).contiguous()
        attention = getattr(self, self.attention)
        rounds = _rounds(x, self._linears())
        h, y = _conv_norm(x, self.conv1, self.norm1, rounds)
        qkv = _linear(y, attention.qkv, rounds)
        y = self._attend(attention, qkv)
        h = _residual_linear(y, attention.proj, h, _factors(self.drop_path1, h), rounds)
        h, y = _conv_norm(h, self.conv2, self.norm2, rounds)
        factors = _factors(self.drop_path2, h)
        h = _residual_mlp(y, self.ffn.fc1, self.ffn.fc2, h, self.activation, factors, rounds)
        return h.permute(0, 3, 1, 2)

    def _attend(self, attention: Any, qkv: Tensor) -> Tensor:
        raise NotImplementedError

    def _linears(self) -> tuple[Any, ...]:
        attention, ffn = getattr(self, self.attention), self.ffn
        return attention.qkv, attention.proj, ffn.fc1, ffn.fc2

    def _fuses(self, x: Tensor) -> bool:
        """Whether this call can bypass its parts, and the kernels that it is made of are there."""
        if type(x) not in DENSE or x.device.type != "cpu" or x.dim() != 4 or x.dtype not in DTYPES:
            return False
        if _transformed() or dispatch.forced() not in (None, "cpu") or not _has_kernels():
            return False
        attention, ffn = getattr(self, self.attention), self.ffn
        convs, norms = (self.conv1, self.conv2), (self.norm1, self.norm2)
        if not (is_bare(attention) and is_bare(ffn) and all(map(is_plain, self._linears()))):
            return False
        if as_written(attention) or not is_known(ffn.activation_fn, self.evaluated):
            return False
        if not all(is_plain(conv, nn.Conv2d) for conv in convs):
            return False
        if not all(is_plain(norm, nn.LayerNorm) and norm.bias is not None for norm in norms):
            return False
        if not all(map(is_bare, (self.drop_path1, self.drop_path2))):
            return False
        if needs_grad(x, *self.parameters()):
            return False
        dtypes = {p.dtype for p in self.parameters()}
        return dtypes <= set(DTYPES) if autocasts("cpu") else dtypes == {x.dtype}


class SpatialHalf(_Half):
    attention = "window_attn"

    def _attend(self, attention: Any, qkv: Tensor) -> Tensor:
        heads, window = attention.num_heads, attention.window_size
        return ops.window_attention(
            qkv, heads, window, pad=attention.qkv.bias, scale=attention.scale
        )


class ChannelHalf(_Half):
    attention = "channel_attn"

    def _attend(self, attention: Any, qkv: Tensor) -> Tensor:
        out = ops.channel_attention(qkv.flatten(1, 2), attention.groups)
        return out.unflatten(1, qkv.shape[1:3])


@torch.compiler.assume_constant_result
def _has_kernels() -> bool:
    """torch.compile asks once: loading the extension, with its lock, is nothing it can trace."""
    return unavailable() is None


def _rounds(x: Tensor, layers: tuple[Any, ...]) -> bool:
    """Whether the products of these layers, patched for arithmetic of fewer bits, all round rows
    like x to bfloat16. Then the branches are bfloat16 throughout, and the residual is as it was.
    """
    if any(getattr(layer, "compute", None) is None for layer in layers):
        return False
    from fastvlm.nn import compute  # loads torch.compile: a second

    return all(compute.rounds(layer, x) for layer in layers)


def _conv_norm(x: Tensor, conv: Any, norm: Any, rounds: bool) -> tuple[Tensor, Tensor]:
    return ops.depthwise_conv_norm(
        *(x, conv.weight, conv.bias, norm.weight, norm.bias),
        eps=norm.eps,
        dtype=torch.bfloat16 if rounds else None,
    )


def _computed(
    x: Tensor, layer: Any, rounds: bool, to: Tensor | None = None, factors: Tensor | None = None
) -> Tensor | None:
    """The product in int8 or bfloat16, where the layer is patched so and it is worth it."""
    if getattr(layer, "compute", None) is None:
        return None
    from fastvlm.nn import compute

    return (compute.rounded_linear if rounds else compute.linear)(x, layer, to, factors)


def _linear(x: Tensor, layer: Any, rounds: bool) -> Tensor:
    y = _computed(x, layer, rounds)
    return ops.linear(x, layer.weight, layer.bias) if y is None else y


def _residual_linear(
    x: Tensor, layer: Any, to: Tensor, factors: Tensor | None, rounds: bool
) -> Tensor:
    y = _computed(x, layer, rounds, to, factors)
    if y is not None:
        return y
    return ops.residual_linear(x, layer.weight, layer.bias, to, factors=factors)


def _residual_mlp(
    x: Tensor, fc1: Any, fc2: Any, to: Tensor, activation: str, factors: Tensor | None, rounds: bool
) -> Tensor:
    if rounds or computes((fc1, fc2), x):
        from fastvlm.nn import compute

        return compute.mlp(x, fc1, fc2, activation, to, factors)
    return ops.residual_gelu_mlp(
        *(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, to),
        activation=activation,
        factors=factors,
    )


def _factors(drop: Any, like: Tensor) -> Tensor | None:
    """What stochastic depth multiplies a branch [B, ...] with, one number an image.

    Its module draws as it would for a branch of the same dtype.
    """
    rate = getattr(drop, "drop_prob", 0.0)
    if rate == 0.0 or not drop.training:
        return None
    drawn = drop(like.new_ones(like.shape[0], 1, 1))
    return (drawn.flatten() != 0).float() / (1.0 - rate)


def choose(half: Any, attention: Swap | str) -> Swap | str:
    """What half of a block becomes, its attention becoming `attention`, or why it stays."""
    name = "window_attn" if hasattr(half, "window_attn") else "channel_attn"
    if extra := extra_parts(half, name, *_PARTS):
        return extra
    if not all(hasattr(half, part) for part in _PARTS):
        return "it has not the parts of a DaViT block"
    if not takes(half, "hidden_states"):
        return "its forward has other arguments than transformers' (hidden_states)"
    if isinstance(attention, str):
        return f"{name} was skipped ({attention})"
    for conv in (half.conv1, half.conv2):
        if not _is_depthwise(conv):
            return "its convolutions are not 3 x 3 of each channel"
    for norm in (half.norm1, half.norm2):
        if (
            not isinstance(norm, nn.LayerNorm)
            or norm.bias is None
            or len(norm.normalized_shape) > 1
        ):
            return "its norms are not LayerNorm over the channels"
    for drop in (half.drop_path1, half.drop_path2):
        if not isinstance(drop, nn.Identity) and type(drop).__name__ != _STOCHASTIC_DEPTH:
            return f"{type(drop).__name__} is not known as stochastic depth"
    act = activation_of(half.ffn.activation_fn) if hasattr(half.ffn, "activation_fn") else None
    if act is None or extra_parts(half.ffn, "fc1", "fc2", "activation_fn"):
        return "its MLP is not fc2(activation(fc1 x))"
    mixin = SpatialHalf if name == "window_attn" else ChannelHalf
    runs_on = ("depthwise_conv_norm", attention.runs_on[0], "residual_linear", "residual_gelu_mlp")
    evaluated = kind_of(half.ffn.activation_fn)
    return Swap(mixin, runs_on, (("activation", act), ("evaluated", evaluated)))


def _is_depthwise(conv: Any) -> bool:
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == conv.padding == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.groups == conv.in_channels == conv.out_channels
    )
