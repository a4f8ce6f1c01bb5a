"""DaViT, the vision tower of Florence-2 (arXiv 2204.03645): window and channel attention.

At 224 px its feature maps of 56, 28, 14 and 7 are padded to windows of 12, after the LayerNorm, and
the padding takes part in the softmax. Every row of it is the same, the projection of zeros, so its
share is known in closed form and qkv, proj and the queries run over the rows of the image alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm.models.structure import extra_parts, has, takes
from fastvlm.nn.linear import is_plain
from fastvlm.nn.mlp import activation_of, gelu_mlp, is_known, kind_of
from fastvlm.ops._autograd import autocast, autocasts
from fastvlm.patching import davit_block
from fastvlm.patching.classes import is_patched
from fastvlm.patching.foreign import as_written
from fastvlm.patching.rules import Rule, Swap
from fastvlm.run.mixin import Mixin

# top, left, number of windows down and across, their height and width
Region = tuple[int, int, int, int, int, int]


def regions(height: int, width: int, size: int) -> list[Region]:
    """A map cut into windows of size x size: the whole ones, and what is left at its far edges."""

    def cuts(length: int) -> list[tuple[int, int, int]]:
        whole, rest = length // size, length % size
        return [cut for cut in ((0, whole, size), (whole * size, 1, rest)) if cut[1] and cut[2]]

    return [
        (top, left, down, across, h, w)
        for top, down, h in cuts(height)
        for left, across, w in cuts(width)
    ]


def _rows(x: Tensor, region: Region) -> Tensor:
    """The rows of a region of x [B, H, W, C], window after window: [rows, C]."""
    top, left, down, across, h, w = region
    x = x[:, top : top + down * h, left : left + across * w]
    x = x.unflatten(2, (across, w)).unflatten(1, (down, h))
    return x.transpose(2, 3).reshape(-1, x.shape[-1])


class _Take(torch.autograd.Function):
    """rows[order], for an order that names each row once: its gradient needs no sums."""

    @staticmethod
    def forward(rows: Tensor, order: Tensor) -> Tensor:
        return rows.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Put.apply(ctx.saved_tensors[0], grad), None


class _Put(torch.autograd.Function):
    """The way back: parts, one after the other, to where `order` says that their rows lie."""

    @staticmethod
    def forward(order: Tensor, *parts: Tensor) -> Tensor:
        out = parts[0].new_empty(order.shape[0], parts[0].shape[1])
        for places, part in zip(order.split([part.shape[0] for part in parts]), parts):
            out.index_copy_(0, places, part)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        order, *parts = inputs
        ctx.save_for_backward(order)
        ctx.lengths = [part.shape[0] for part in parts]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, *_Take.apply(grad, ctx.saved_tensors[0]).split(ctx.lengths)


def pad_biases(count: int, dtype: torch.dtype) -> list[float]:
    """What is added to the scores of keys that together count as `count` equal ones.

    One key with log(count) would do, were it not rounded: it can be 1.6 % off in bfloat16, in every
    window and always to the same side. So each is rounded down, and another makes up for the rest,
    until their exp add up to count within a sixteenth of a rounding.
    """
    grid = torch.finfo(dtype).eps / 2
    biases, rest = [], float(count)
    while rest > count * grid / 8:
        mantissa, exponent = math.frexp(math.log(rest))
        biases.append(math.ldexp(math.floor(mantissa / grid) * grid, exponent))
        rest -= math.exp(biases[-1])
    return biases


def window_attention(qkv: Tensor, pad: Tensor, count: int, scale: float) -> Tensor:
    """Attention inside each of W windows of n rows, to which `count` rows of padding are added.

    qkv: [W, n, 3, heads, D]. pad: [3, heads, D], what qkv is in a row of padding. -> [W, n, C].
    """
    q, kv = qkv.split((1, 2), 2)
    bias = None
    if count > 0:
        biases = pad_biases(count, qkv.dtype)
        extra = pad[1:].expand(kv.shape[0], len(biases), *pad[1:].shape)
        kv = torch.cat((kv, extra), 1)
        bias = qkv.new_zeros(1, kv.shape[1])
        for place, value in enumerate(biases, qkv.shape[1]):
            bias[:, place].fill_(value)  # no copy from the host, which on a GPU would wait
    k, v = kv.transpose(1, 3).unbind(2)
    q = q.squeeze(2).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).flatten(2)


class _Windows(Mixin):
    """Attention inside windows of a feature map, computed for its own rows only.

    The softmax of a window that the original pads has one more term, count * exp(score) for all of
    its padding, and that term's value is the v of a row of zeros.
    """

    def _attend(self, hidden_states: Tensor) -> Tensor:
        batch, height, width, dim = hidden_states.shape
        parts = regions(height, width, self.window_size)
        if len(parts) == 1:
            rows = _rows(hidden_states, parts[0])
        else:
            places = torch.arange(batch * height * width, device=hidden_states.device)
            places = places.view(batch, height, width, 1)
            order = torch.cat([_rows(places, part) for part in parts]).squeeze(1)
            rows = _Take.apply(hidden_states.reshape(-1, dim), order)
        qkv, pad = autocast(self.qkv(rows), self._padding(rows))
        heads = (3, self.num_heads, dim // self.num_heads)
        whole, out = self.window_size**2, []
        lengths = [batch * down * across * h * w for _, _, down, across, h, w in parts]
        for (*_, h, w), part in zip(parts, qkv.split(lengths)):
            part = part.reshape(-1, h * w, *heads)
            part = window_attention(part, pad.reshape(heads), whole - h * w, self.scale)
            out.append(part.flatten(0, 1))
        if len(parts) == 1:
            _, _, down, across, h, w = parts[0]
            x = out[0].view(batch, down, across, h, w, dim).transpose(2, 3)
        else:
            x = _Put.apply(order, *out)
        return self.proj(x.reshape(batch, height * width, dim))

    def _padding(self, rows: Tensor) -> Tensor:
        """q, k and v of a row of padding [3 C]: what qkv makes of zeros."""
        if not is_plain(self.qkv):
            return self.qkv(rows.new_zeros(1, rows.shape[1])).squeeze(0)
        if self.qkv.bias is None:
            return rows.new_zeros(self.qkv.weight.shape[0])
        return self.qkv.bias


class WindowAttention(_Windows):
    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, H, W, C] -> [B, H * W, C]."""
        if as_written(self):
            return super().forward(hidden_states)
        return self._attend(hidden_states)


class SizedWindowAttention(_Windows):
    """The form of the published code, which hands the size of the map through."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """x [B, H * W, C], size (H, W) -> the same."""
        if as_written(self):
            return super().forward(x, size)
        return self._attend(x.unflatten(1, size)), size


class _Channels(Mixin):
    """Attention between the channels of a group: scores [D, D] are sums over the tokens."""

    def _attend(self, hidden_states: Tensor) -> Tensor:
        qkv = autocast(self.qkv(hidden_states))[0]
        qkv = qkv.unflatten(2, (3, self.groups, -1)).permute(2, 0, 3, 1, 4)
        out = channel_attention(*qkv.unbind(0))
        return self.proj(out.transpose(1, 2).flatten(2))


class ChannelAttention(_Channels):
    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, N, C] -> [B, N, C]."""
        if as_written(self):
            return super().forward(hidden_states)
        return self._attend(hidden_states)


class SizedChannelAttention(_Channels):
    def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """x [B, N, C], size (H, W) -> the same."""
        if as_written(self):
            return super().forward(x, size)
        return self._attend(x), size


def channel_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q^T k / sqrt(N)) applied to the channels of v.

    q, k, v: [B, groups, N, D], any strides -> [B, groups, N, D]. 16-bit scores would be rounded
    where the softmax is steep: they are summed and normalized in float32, as PyTorch does.
    """
    device, dtype = q.device.type, v.dtype
    with torch.autocast(device, enabled=False) if autocasts(device) else nullcontext():
        if dtype.itemsize == 2:
            # the layout that the product wants anyway, in the same pass
            q, k = (x.to(torch.float32, memory_format=torch.contiguous_format) for x in (q, k))
        # flattened before k is transposed: where that copies, it copies runs of D
        q, k, values = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.bmm(k.transpose(1, 2), q)
        weights = (scores * q.shape[1] ** -0.5).softmax(1)
        return torch.bmm(values, weights.to(dtype)).view(v.shape)


class VisionMLP(Mixin):
    """fc2(activation(fc1 x)), in one op where both layers may be bypassed."""

    activation = "gelu"
    evaluated = ""

    def forward(self, hidden_states: Tensor) -> Tensor:
        act = None if is_known(self.activation_fn, self.evaluated) else self.activation_fn
        return gelu_mlp(hidden_states, self.fc1, self.fc2, self.activation, 0.0, act)


def channels_together(x: Tensor) -> Tensor:
    """x [B, C, H, W], with strides that say so where the channels of its one image lie together.

    The stride of a dimension of length 1 is arbitrary, and PyTorch takes some that transformers'
    views leave there for those of a map that lies channel after channel.
    """
    if x.dim() == 4 and x.shape[0] == 1 and x.stride(1) == 1:
        return x[0].permute(1, 2, 0).unsqueeze(0).permute(0, 3, 1, 2)
    return x


class DepthwiseConv(Mixin):
    """The convolution of a map whose channels lie together, to one that lies in the same way.

    Else its block adds it to its input, and normalizes it, across the memory of the two.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, H, W] -> the same shape."""
        out: Tensor = super().forward(channels_together(input))
        return out


_OTHER_ARGUMENTS = "its forward has other arguments than hidden_states, or x and size"


def _choose(op: str, mixin: type[nn.Module], sized: type[nn.Module]) -> Any:
    def choose(module: Any) -> Swap | str:
        if extra := extra_parts(module, "qkv", "proj", "softmax"):
            return extra
        if takes(module, "hidden_states"):
            return Swap(mixin, (op,))
        return Swap(sized, (op,)) if takes(module, "x", "size") else _OTHER_ARGUMENTS

    return choose


def _mlp(module: Any) -> Swap | str:
    act = activation_of(module.activation_fn)
    if act is None:
        return f"its activation {type(module.activation_fn).__name__} is none that gelu_mlp has"
    if not takes(module, "hidden_states"):
        return "its forward has other arguments than transformers' (hidden_states)"
    extra = extra_parts(module, "fc1", "fc2", "activation_fn")
    attributes = (("activation", act), ("evaluated", kind_of(module.activation_fn)))
    return extra or Swap(VisionMLP, ("gelu_mlp",), attributes)


_ATTENTION = (
    Rule(
        ("attention",),
        has("qkv", "proj", "window_size", "num_heads", "scale"),
        _choose("window_attention", WindowAttention, SizedWindowAttention),
    ),
    Rule(
        ("attention",),
        has("qkv", "proj", "groups"),
        _choose("channel_attention", ChannelAttention, SizedChannelAttention),
    ),
)
_CONV = Rule(
    ("linear",),
    lambda m: type(m) is nn.Conv2d and m.groups == m.in_channels == m.out_channels,
    lambda m: Swap(DepthwiseConv, ("depthwise_conv",)),
)
KNOWN = ("transformers.models.florence2.modeling_florence2",)
_BLOCK = ("window_attn", "channel_attn")
_FFN = Rule(("mlp",), has("fc1", "fc2", "activation_fn"), _mlp)


def _half(block: Any) -> Swap | str:
    attention = next(getattr(block, name) for name in _BLOCK if hasattr(block, name))
    rule = next((r for r in _ATTENTION if r.matches(attention)), None)
    if rule is None:
        return "its attention is not known"
    swap = type(attention)._fastvlm_swap if is_patched(attention) else rule.choose(attention)
    return davit_block.choose(block, swap)


_HALF = Rule(("attention", "mlp", "linear"), has("conv1", "norm1", "ffn"), _half)


def tower_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Rule]]:
    """The parts of DaViT blocks in a model, each with its rule: (name, module, rule)."""
    for name, block in model.named_modules():
        if not any(isinstance(getattr(block, attention, None), nn.Module) for attention in _BLOCK):
            continue
        if _HALF.matches(block):
            yield name, block, _HALF
        for inner, module in block.named_modules(prefix=name):
            rule = next((r for r in (*_ATTENTION, _FFN, _CONV) if r.matches(module)), None)
            if rule is not None:
                yield inner, module, rule
