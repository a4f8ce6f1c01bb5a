"""Launchers of csrc/cuda/attention.cu: attention of few query rows, a decoding step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm.triton.common import (
    NO_BIAS,
    Launcher,
    beyond_kernels,
    cdiv,
    dense_last,
    has_bias,
    multiprocessors,
)

LOG2E = 1.4426950408889634
HEAD_DIMS = (64, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
# rows of a tile (kQueryRows of csrc/cuda/attention.h), and tiles of an image up to which its keys
# are read once for each: more rows than a decoding step has
TILE, MOST_TILES = 16, 4
# keys of a block, and of a split at least; parts of the keys (kMostSplits of csrc/cuda/attention.h)
KEYS = 64
MOST_SPLITS = 32


def _scales(scale: float, softcap: float) -> tuple[float, float, bool]:
    """What multiplies q.k and what multiplies the tanh after it, to give scores in base 2."""
    if softcap > 0:
        return scale / softcap, softcap * LOG2E, True
    return scale * LOG2E, 1.0, False


def _splits(x: Tensor, blocks: int, keys: int) -> int:
    """Parts of the keys until there are two blocks for every multiprocessor."""
    wanted = cdiv(2 * multiprocessors(x), max(1, blocks))
    return max(1, min(wanted, cdiv(keys, KEYS), MOST_SPLITS))


def _cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    image_of: Tensor,
    rows_by_image: Tensor | None,
    reader_offsets: Tensor,
    seed: Tensor | None,
    max_q: int,
    max_kv: int,
    max_readers: int,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    position_bias: None = None,
    window_after: int = 0,
) -> tuple[Tensor, Tensor]:
    kv_heads, images = k.shape[1], kv_offsets.shape[0] - 1
    tiles = cdiv(max_readers * (q.shape[1] // kv_heads), TILE)
    splits = _splits(q, images * tiles * kv_heads, max_kv)
    return torch.ops.fastvlm_cuda.cross_attention(
        dense_last(q), dense_last(k), dense_last(v), kv_offsets, reader_offsets, rows_by_image,
        max_readers, *_scales(scale, softcap), splits,
    )  # fmt: skip


def _cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    ancestry: Tensor | None,
    window: int,
    scale: float,
    softcap: float,
    position_bias: None = None,
) -> Tensor:
    time, kv_heads = k_cache.shape[1], k_cache.shape[2]
    window = 0 if window >= time else window
    tiles = cdiv(q.shape[1] // kv_heads, TILE)
    splits = _splits(q, q.shape[0] * tiles * kv_heads, window or time)
    return torch.ops.fastvlm_cuda.cached_attention(
        dense_last(q), dense_last(k_cache), dense_last(v_cache), lengths.contiguous(),
        None if ancestry is None else dense_last(ancestry), window, *_scales(scale, softcap),
        splits,
    )  # fmt: skip


def _misfit(**heads: Tensor) -> str | None:
    """Why the kernels cannot read these heads."""
    k = next(iter(heads.values()))
    if k.dtype not in DTYPES:
        return f"{k.dtype} (it has bfloat16 and float16)"
    if k.shape[-1] not in HEAD_DIMS:
        return f"head dimension {k.shape[-1]} (it has {', '.join(map(str, HEAD_DIMS))})"
    for name, x in heads.items():
        if x.shape[-1] != k.shape[-1]:
            return "a head dimension of v that is not the one of k"
        if x.stride(-1) != 1:
            continue  # is copied
        strides = (x.stride(d) for d in range(x.dim() - 1) if x.shape[d] > 1)
        if x.data_ptr() % 16 or any(stride % 8 for stride in strides):
            return f"heads of {name} that do not begin at multiples of 16 bytes"
    return None


def _unsupported_cross(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    max_readers, causal, window, dropout_p = rest[8], rest[9], rest[10], rest[13]
    if causal or window:
        return "a causal mask or window over the tokens of an image"
    if dropout_p > 0:
        return "dropout"
    if missing := beyond_kernels(rest, 14, backward=False):
        return missing
    if k.shape[1] and max_readers * (q.shape[1] // k.shape[1]) > TILE * MOST_TILES:
        return f"more than {TILE * MOST_TILES} query rows to a head of an image"
    return _misfit(k=k, v=v, q=q)


def _unsupported_cached(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> str | None:
    if has_bias(rest, 5):
        return NO_BIAS
    return _misfit(k_cache=k_cache, v_cache=v_cache, q=q)


LAUNCHERS = {
    "cross_attention": Launcher(_cross_attention, _unsupported_cross),
    "cached_attention": Launcher(_cached_attention, _unsupported_cached),
}
