"""Launchers of csrc/cpu/window_attention.cpp, channel_attention.cpp and depthwise.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm.cpu import bf16
from fastvlm.cpu.common import DTYPES, dense_bias, dense_last, unavailable, wrong_dtype
from fastvlm.ops.dispatch import Kernel

_LEAST_SCALE = 1e-30  # in tiles, where what padding adds to a score is divided by it
_MOST_WINDOW = 64  # a row of scores of a larger window would leave the cache


def _window_attention(
    qkv: Tensor, pad: Tensor | None, heads: int, window: int, scale: float
) -> Tensor:
    in_tiles = qkv.dtype == torch.bfloat16 and scale > _LEAST_SCALE and bf16.tiles()
    return torch.ops.fastvlm_cpu.window_attention(
        qkv.contiguous(), dense_bias(pad), heads, window, scale, in_tiles
    )


def _window_unsupported(
    qkv: Tensor, pad: Tensor | None, heads: int, window: int, scale: float
) -> str | None:
    if min(window, max(qkv.shape[1:3])) > _MOST_WINDOW:
        return f"windows of {window}: it has them up to {_MOST_WINDOW}"
    return _unsupported(qkv, pad)


def _channel_attention(qkv: Tensor, groups: int) -> Tensor:
    return torch.ops.fastvlm_cpu.channel_attention(qkv.contiguous(), groups)


def _depthwise_conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    h, y = torch.ops.fastvlm_cpu.depthwise_conv_norm(
        x.contiguous(),
        dense_last(weight),
        dense_bias(bias),
        dense_last(norm_weight),
        dense_last(norm_bias),
        eps,
        dtype,
    )
    return h, y


def _unsupported(*arguments: Any) -> str | None:
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.dtype not in DTYPES:
            return wrong_dtype(argument)
        if isinstance(argument, torch.dtype) and argument not in DTYPES:
            return f"{argument} (it gives float32, bfloat16, float16)"
    return None


KERNELS = {
    "window_attention": Kernel("cpu", _window_attention, unavailable, _window_unsupported),
    "channel_attention": Kernel("cpu", _channel_attention, unavailable, _unsupported),
    "depthwise_conv_norm": Kernel("cpu", _depthwise_conv_norm, unavailable, _unsupported),
}
