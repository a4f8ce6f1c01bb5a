"""Launchers of attention over packed rows and of cached_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvlm.triton import configs
from fastvlm.triton.common import (
    NO_BIAS,
    Launcher,
    beyond_kernels,
    cdiv,
    dense_last,
    device_of,
    has_bias,
    keep_threshold,
    multiprocessors,
    next_power_of_2,
    wrong_dtype,
)
from fastvlm.triton.configs import Config
from fastvlm.triton.kernels import attention as forward
from fastvlm.triton.kernels import attention_backward as backward
from fastvlm.triton.kernels import cached_attention as cached

WIDEST = 256
LOG2E = 1.4426950408889634
# blocks of rows up to here count as decoding: few readers, so that the keys are worth splitting
FEW = 64
MOST_SPLITS = 32


def _scales(scale: float, softcap: float) -> tuple[float, float]:
    """What multiplies q.k, and what multiplies the tanh after it, to give scores in base 2."""
    return (scale / softcap, softcap * LOG2E) if softcap > 0 else (scale * LOG2E, 1.0)


def _window(window: int, longest: int) -> int:
    """0, none, where no two places of a segment are so far apart: nothing is hidden, and sums of a
    place and a window stay in 32 bits."""
    return 0 if window >= longest else window


def _shape(x: Tensor) -> dict[str, Any]:
    """The constexpr arguments that follow from head_dim and dtype."""
    d = x.shape[-1]
    block = max(16, next_power_of_2(d))
    return {
        "D": d,
        "BLOCK_D": block,
        "EVEN": block == d,
        # float32 is exact whatever PyTorch allows its products: scores go into an exponential,
        # and the tiles of TF32 with their softmax do not fit into the registers
        "PRECISION": "ieee",
        "ACCURATE": x.dtype == torch.float32,
        "CHUNK_D": min(block, 32),
        "CHUNK_N": 16,
    }


def _flags(
    seed: Tensor | None,
    rows_by_image: Tensor | None,
    causal: bool,
    window: int,
    softcap: float,
    dropout_p: float,
) -> dict[str, bool]:
    return {
        "CAUSAL": causal,
        "HAS_WINDOW": window > 0,
        "HAS_CAP": softcap > 0,
        "HAS_DROPOUT": seed is not None and dropout_p > 0,
        "HAS_ORDER": rows_by_image is not None,
    }


def _splits(x: Tensor, programs: int, keys: int) -> int:
    """Parts of the keys, 64 or more in each, until there is work for every multiprocessor.

    A power of two: each number of splits is a kernel of its own.
    """
    wanted = min(cdiv(2 * multiprocessors(x), max(1, programs)), keys // 64, MOST_SPLITS)
    return 1 << (max(1, wanted).bit_length() - 1)


def _for_splits(out: Tensor, stats: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where a kernel leaves its parts: out and stats themselves where there is one."""
    if splits == 1:
        return out, stats
    parts = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
    return parts, torch.empty((splits, *stats.shape), dtype=torch.float32, device=out.device)


def _combine(parts: Tensor, parts_stats: Tensor, out: Tensor, stats: Tensor) -> None:
    splits, d, count = parts.shape[0], out.shape[-1], stats.numel() // 2
    forward.attention_combine[(count,)](
        parts, parts_stats, out, stats, count, D=d, SPLITS=splits,
        BLOCK_D=next_power_of_2(d), BLOCK_S=next_power_of_2(splits), num_warps=1 if d <= 128 else 2,
    )  # fmt: skip


def _key(x: Tensor, rows: int) -> dict[str, int]:
    """What the tables of configs go by: bytes of an element, padded head_dim, rows of an image."""
    size, d = x.element_size(), max(16, next_power_of_2(x.shape[-1]))
    return {"size": size, "d": d, "rows": min(next_power_of_2(rows), 2 * FEW)}


def _attention(
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
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    rows, heads, _ = q.shape
    kv_heads = k.shape[1]
    group, images = heads // kv_heads, kv_offsets.shape[0] - 1
    out = q.new_empty(q.shape)
    stats = torch.empty((rows, heads, 2), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, stats
    window = _window(window, max_q)
    flags = _flags(seed, rows_by_image, causal, window, softcap, dropout_p)
    inner, outer = _scales(scale, softcap)

    def run(config: Config) -> None:
        blocks = cdiv(max_readers * group, config.blocks["BLOCK_M"])
        splits = 1
        if max_readers * group <= FEW and not causal and window == 0:
            splits = _splits(q, images * blocks * kv_heads, max_kv)
        to, to_stats = _for_splits(out, stats, splits)
        forward.attention_forward[(images * blocks, kv_heads * splits)](
            q, k, v, to, to_stats, rows_by_image, reader_offsets, kv_offsets, seed,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            rows, heads, blocks, window, inner, outer, keep_threshold(dropout_p),
            1.0 / (1.0 - dropout_p), GROUP=group, SPLITS=splits, **_shape(q), **flags,
            **config.arguments,
        )  # fmt: skip
        if splits > 1:
            _combine(to, to_stats, out, stats)

    with device_of(q):
        configs.launch("attention_forward", q, run, **_key(q, max_readers * group))
    return out, stats


def _attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
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
    needs: list[bool],
    position_bias: None = None,
    need_bias: bool = False,
    window_after: int = 0,
    grad_lse: None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_out, q, k, v = (dense_last(x) for x in (grad_out, q, k, v))
    out, stats = out.contiguous(), stats.contiguous()
    dq, dk, dv = (
        x.new_empty(x.shape) if need else x.new_empty(0) for x, need in zip((q, k, v), needs)
    )
    rows, heads, _ = q.shape
    kv_heads = k.shape[1]
    group, images = heads // kv_heads, kv_offsets.shape[0] - 1
    delta = torch.empty((rows, heads), dtype=torch.float32, device=q.device)
    window = _window(window, max_q)
    flags = _flags(seed, rows_by_image, causal, window, softcap, dropout_p)
    inner, outer = _scales(scale, softcap)
    where = (rows_by_image, reader_offsets, kv_offsets, seed)
    strides = [x.stride(i) for x in (grad_out, q, k, v) for i in (0, 1)]
    numbers = (window, scale, inner, outer, keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p))
    same = {"GROUP": group, **_shape(q), **flags}

    def run_q(config: Config) -> None:
        blocks = cdiv(max_readers * group, config.blocks["BLOCK_M"])
        backward.attention_backward_q[(images * blocks, kv_heads)](
            grad_out, q, k, v, out, stats, delta, dq, *where, *strides, heads, blocks, *numbers,
            NEED_Q=needs[0], **same, **config.arguments,
        )  # fmt: skip

    def run_kv(config: Config) -> None:
        blocks = cdiv(max_kv, config.blocks["BLOCK_N"])
        wanted = [(needs[1], needs[2])]
        if config.apart and needs[1] and needs[2]:
            wanted = [(True, False), (False, True)]
        for need_k, need_v in wanted:
            backward.attention_backward_kv[(images * blocks, kv_heads)](
                grad_out, q, k, v, stats, delta, dk, dv, *where, *strides, heads, kv_heads, blocks,
                *numbers, NEED_K=need_k, NEED_V=need_v, **same, **config.arguments,
            )  # fmt: skip

    key = _key(q, max_readers * group)
    with device_of(q):
        if q.numel():
            configs.launch("attention_backward_q", q, run_q, **key)
        if k.numel() and (needs[1] or needs[2]):
            configs.launch("attention_backward_kv", q, run_kv, **key)
    return dq, dk, dv, q.new_empty(0)


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
    q, k_cache, v_cache = dense_last(q), dense_last(k_cache), dense_last(v_cache)
    lengths = lengths.contiguous()
    ancestry = None if ancestry is None else dense_last(ancestry)
    rows, heads, _ = q.shape
    kv_heads = k_cache.shape[2]
    group = heads // kv_heads
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    inner, outer = _scales(scale, softcap)
    window = _window(window, k_cache.shape[1])
    keys = window if window > 0 else k_cache.shape[1]
    splits = _splits(q, rows * kv_heads, keys)
    stats = torch.empty((rows, heads, 2) if splits > 1 else 0, dtype=torch.float32, device=q.device)
    to, to_stats = _for_splits(out, stats, splits)

    def run(config: Config) -> None:
        cached.cached_attention[(rows, kv_heads * splits)](
            q, k_cache, v_cache, to, to_stats, lengths, ancestry, q.stride(0), q.stride(1),
            *k_cache.stride()[:3], *v_cache.stride()[:3],
            0 if ancestry is None else ancestry.stride(0), rows, heads, window, inner, outer,
            GROUP=group, HAS_ANCESTRY=ancestry is not None, HAS_WINDOW=window > 0,
            HAS_CAP=softcap > 0, SPLITS=splits, BLOCK_G=max(16, next_power_of_2(group)),
            **_shape(q), **config.arguments,
        )  # fmt: skip
        if splits > 1:
            _combine(to, to_stats, out, stats)

    with device_of(q):
        configs.launch("cached_attention", q, run, **_key(q, group))
    return out


def _head_dim(k: Tensor, v: Tensor) -> str | None:
    if v.shape[-1] != k.shape[-1]:
        return "a head dimension of v that is not the one of k"
    if k.shape[-1] > WIDEST:
        return f"head dimension {k.shape[-1]} (it has up to {WIDEST})"
    return wrong_dtype(k)


def _packed(run: Callable[..., Any], first: int, masks: int, of_itself: bool) -> Launcher:
    """first, masks: the places of q (k and v follow) and causal (window follows, and behind the
    numbers, and what is wanted of a backward, the bias) in the schema."""

    def unsupported(*args: Any) -> str | None:
        causal, window = args[masks : masks + 2]
        if not of_itself and (causal or window):
            return "a causal mask or window over the tokens of an image"
        missing = beyond_kernels(args, masks + 5 + first, backward=first > 0)
        return missing or _head_dim(args[first + 1], args[first + 2])

    return Launcher(run, unsupported)


LAUNCHERS = {
    "cross_attention": _packed(_attention, 0, 12, False),
    "cross_attention_backward": _packed(_attention_backward, 1, 15, False),
    "self_attention": _packed(_attention, 0, 12, True),
    "self_attention_backward": _packed(_attention_backward, 1, 15, True),
    "cached_attention": Launcher(
        _cached_attention,
        lambda q, k_cache, v_cache, *rest: (
            NO_BIAS if has_bias(rest, 5) else _head_dim(k_cache, v_cache)
        ),
    ),
}
