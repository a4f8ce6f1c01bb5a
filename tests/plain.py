"""Every op once more, in the plainest PyTorch there is: what the tests hold fastvlm against.

Written from the formulas, not from fastvlm.reference, and differentiable by autograd. In float64
these are the exact results; in the dtype under test, what PyTorch makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lengths: list[int],
    kv_lengths: list[int],
    image_of: list[int],
    *,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    places: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """One segment at a time: scores, cap, bias, mask, softmax, weighted sum.

    places: of the rows and the keys, where they are not counted from 0.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    images = list(zip(k.split(kv_lengths), v.split(kv_lengths)))
    out = []
    for rows, image in zip(q.split(q_lengths), image_of):
        keys, values = (x.repeat_interleave(group, 1) for x in images[image])
        if keys.shape[0] == 0:
            out.append(rows * 0)
            continue
        scores = torch.matmul(rows.transpose(0, 1), keys.permute(1, 2, 0)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        of_row, of_key = places or (torch.arange(x.shape[0], device=x.device) for x in (rows, keys))
        distance = of_row[:, None] - of_key
        if position_bias is not None:
            most = position_bias.shape[1] // 2
            columns = (-distance).clamp(-most, most) + most
            scores = scores + position_bias[:, columns].to(scores.dtype)
        if causal:
            scores = scores.masked_fill(distance < 0, float("-inf"))
        if window is not None:
            before, behind = window if isinstance(window, tuple) else (window - 1, window - 1)
            scores = scores.masked_fill((distance > before) | (-distance > behind), float("-inf"))
        out.append(torch.matmul(scores.softmax(-1), values.transpose(0, 1)).transpose(0, 1))
    unread = 0 * (k.sum() + v.sum())  # an image that nobody reads has a gradient too: zero
    return (torch.cat(out) if out else q * 0) + unread


def merged_scores(
    q: Tensor,
    k: Tensor,
    other_k: Tensor,
    lengths: list[int],
    kv_lengths: list[int],
    image_of: list[int],
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    """Of each segment [H, L, L + K]: those of the rows before, in the window, and of an image."""
    group, found = q.shape[1] // k.shape[1], []
    images = other_k.split(kv_lengths)
    for rows, own, image in zip(q.split(lengths), k.split(lengths), image_of):
        keys = torch.cat([own, images[image]]).repeat_interleave(group, 1)
        scores = torch.einsum("lhd,khd->hlk", rows, keys) * q.shape[-1] ** -0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        places = torch.arange(len(rows))
        distance = places[:, None] - places
        hidden = (distance < 0) | (distance >= (len(rows) + 1 if window is None else window))
        hidden = torch.nn.functional.pad(hidden, (0, len(images[image])))
        found.append(scores.masked_fill(hidden, float("-inf")))
    return found


def merged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    other_k: Tensor,
    other_v: Tensor,
    lengths: list[int],
    kv_lengths: list[int],
    image_of: list[int],
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One softmax over the rows of a segment up to each row and the image that it reads."""
    scores = merged_scores(q, k, other_k, lengths, kv_lengths, image_of, window, softcap)
    group, out = q.shape[1] // k.shape[1], []
    images = other_v.split(kv_lengths)
    for of_segment, own, image in zip(scores, v.split(lengths), image_of):
        values = torch.cat([own, images[image]]).repeat_interleave(group, 1)
        out.append(torch.einsum("hlk,khd->lhd", of_segment.softmax(-1), values))
    return torch.cat(out) + 0 * (other_k.sum() + other_v.sum())


def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: list[int],
    ancestry: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """One row at a time, the positions it sees gathered from the rows that hold them."""
    out = []
    for r in range(q.shape[0]):
        seen = []
        for t in range(lengths[r]):
            row = r if ancestry is None else int(ancestry[r, t])
            if row >= 0 and (window is None or t >= lengths[r] - window):
                seen.append((row, t))
        keys = torch.stack([k_cache[s] for s in seen]) if seen else k_cache[0, :0]
        values = torch.stack([v_cache[s] for s in seen]) if seen else v_cache[0, :0]
        places = torch.tensor([lengths[r] - 1]), torch.tensor([t for _, t in seen])
        settings = {"softcap": softcap, "position_bias": position_bias, "places": places}
        out.append(attention(q[r : r + 1], keys, values, [1], [len(seen)], [0], **settings))
    return torch.cat(out)


def activated(x: Tensor, activation: str) -> Tensor:
    """ "none" and "tanh": the older names of two."""
    match activation:
        case "relu":
            return F.relu(x)
        case "silu":
            return F.silu(x)
        case "gelu" | "none":
            return F.gelu(x)
        case "gelu_tanh" | "tanh":
            return F.gelu(x, approximate="tanh")
    raise AssertionError(activation)


def gelu_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> Tensor:
    return F.linear(activated(F.linear(x, w1, b1), activation), w2, b2)


def geglu_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: str) -> Tensor:
    hidden = activated(F.linear(x, w_gate), activation) * F.linear(x, w_up)
    return F.linear(hidden, w_down)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, offset: float = 1.0) -> Tensor:
    """As transformers' Gemma2RMSNorm: float32 inside, rounded once."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (offset + weight.to(wide.dtype))).to(x.dtype)


def residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor | None,
) -> tuple[Tensor, ...]:
    branch = rms_norm(x, weight)
    h = residual + (branch if gate is None else torch.tanh(gate) * branch)
    return (h,) if next_weight is None else (h, rms_norm(h, next_weight))


def of_each_gate(residual_rms_norm: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """residual_rms_norm once for each gate of a vector, on rows of its own.

    The gradient of one gate is one number, and what PyTorch's is off by is a draw from around zero:
    about one in twenty is so small that a result as exact as PyTorch's breaks the error rule. The
    largest of sixteen is a measure.
    """

    def run(
        x: Tensor, residual: Tensor, weight: Tensor, gates: Tensor, following: Tensor
    ) -> tuple[Tensor, ...]:
        outs = [
            residual_rms_norm(x[i], residual[i], weight, gates[i : i + 1], following)
            for i in range(gates.shape[0])
        ]
        return tuple(torch.stack(parts) for parts in zip(*outs))

    return run


def residual_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(residual + x, x.shape[-1:], weight, bias)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        half = torch.cat((-second, first), -1)
        return x * cos[:, None] + half * sin[:, None]

    return turn(q), turn(k)


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    logits = F.linear(h, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, labels, reduction=reduction)


def window_attention(qkv: Tensor, heads: int, window: int, pad: Tensor | None) -> Tensor:
    """One window at a time, its missing rows filled up."""
    images, height, width, wide = qkv.shape
    out = qkv.new_zeros(images, height, width, wide // 3)
    fill = torch.zeros_like(qkv[..., :0].new_zeros(wide)) if pad is None else pad
    for image in range(images):
        for top in range(0, height, window):
            for left in range(0, width, window):
                part = qkv[image, top : top + window, left : left + window]
                rows = part.reshape(-1, wide)
                missing = window * window - rows.shape[0]
                rows = torch.cat((rows, fill.expand(missing, wide)))
                q, k, v = rows.view(-1, 3, heads, wide // (3 * heads)).permute(1, 2, 0, 3)
                scores = q @ k.transpose(1, 2) * k.shape[-1] ** -0.5
                got = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
                got = got[: part.shape[0] * part.shape[1]].view(*part.shape[:2], -1)
                out[image, top : top + window, left : left + window] = got
    return out


def channel_attention(qkv: Tensor, groups: int) -> Tensor:
    q, k, v = qkv.unflatten(2, (3, groups, -1)).permute(2, 0, 3, 4, 1)
    scores = (q @ k.transpose(2, 3)).float() if qkv.dtype != torch.float64 else q @ k.mT
    weights = (scores * qkv.shape[1] ** -0.5).softmax(-1).to(qkv.dtype)
    return (weights @ v).permute(0, 3, 1, 2).flatten(2)


def depthwise_conv_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return x, x
    conv = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[3])
    h = x + conv.permute(0, 2, 3, 1)
    return h, F.layer_norm(h, h.shape[-1:], norm_weight, norm_bias)


def residual_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, factors: Tensor | None
) -> Tensor:
    branch = F.linear(x, weight, bias)
    if factors is not None:
        each = factors.to(branch.dtype).repeat_interleave(branch.shape[0] // factors.shape[0])
        branch = branch * each[:, None]
    return residual + branch
