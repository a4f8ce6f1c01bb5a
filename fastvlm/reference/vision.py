"""The ops of DaViT, Florence-2's vision tower (arXiv 2204.03645), in plain PyTorch.

Differentiable; 16-bit scores, sums and normalizations are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def window_attention(
    qkv: Tensor, pad: Tensor | None, heads: int, window: int, scale: float
) -> Tensor:
    """qkv [B, H, W, 3 C], pad [3 C] -> [B, H, W, C]: softmax attention in windows of the map.

    A window past the edge of the map is filled up with rows `pad` (zeros where it is None).
    """
    batch, height, width, wide = qkv.shape
    down, across = -(-height // window), -(-width // window)
    fill = qkv.new_zeros(wide) if pad is None else pad.to(qkv.dtype)
    x = fill.expand(batch, down * window, across * window, wide)
    if x.shape[1:3] == qkv.shape[1:3]:
        x = qkv
    else:
        right = x[:, :height, width:]
        x = torch.cat((torch.cat((qkv, right), 2), x[:, height:]), 1)
    x = x.unflatten(2, (across, window)).unflatten(1, (down, window)).transpose(2, 3)
    x = x.reshape(batch * down * across, window * window, 3, heads, wide // (3 * heads))
    q, k, v = _wide(x).permute(2, 0, 3, 1, 4)
    weights = (torch.matmul(q, k.transpose(2, 3)) * scale).softmax(3)
    out = torch.matmul(weights, v).to(qkv.dtype).transpose(1, 2)
    out = out.reshape(batch, down, across, window, window, wide // 3).transpose(2, 3)
    out = out.reshape(batch, down * window, across * window, wide // 3)
    return out[:, :height, :width].contiguous()


def channel_attention(qkv: Tensor, groups: int) -> Tensor:
    """qkv [B, N, 3 C] -> [B, N, C]: the channels of a group attend to each other.

    softmax over k's channels of q^T k / sqrt(N), applied to the channels of v.
    """
    q, k, v = _wide(qkv).unflatten(2, (3, groups, -1)).permute(2, 0, 3, 1, 4)
    scores = torch.matmul(k.transpose(2, 3), q) * max(1, qkv.shape[1]) ** -0.5
    out = torch.matmul(v, scores.softmax(2)).to(qkv.dtype)
    return out.transpose(1, 2).flatten(2).contiguous()


def depthwise_conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x [B, H, W, C], weight [C, 9] -> h = x + conv3x3(x) + bias in x's dtype, LayerNorm(h)."""
    wide = _wide(x)
    kernel = weight.to(wide.dtype).view(-1, 1, 3, 3)
    shift = None if bias is None else bias.to(wide.dtype)
    sums = wide.permute(0, 3, 1, 2)
    if x.numel():
        sums = F.conv2d(sums, kernel, shift, padding=1, groups=x.shape[3])
    h = wide + sums.permute(0, 2, 3, 1)
    y = F.layer_norm(h, h.shape[-1:], norm_weight.to(wide.dtype), norm_bias.to(wide.dtype), eps)
    return h.to(x.dtype).contiguous(), y.to(dtype).contiguous()
