"""Launchers of csrc/cpu/attention.cpp, attention_backward.cpp and cached_attention.cpp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvlm.cpu.common import dense_last, unavailable, wrong_dtype
from fastvlm.ops.dispatch import Kernel


def _dense(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()


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
    position_bias: Tensor | None = None,
    window_after: int = 0,
) -> tuple[Tensor, Tensor]:
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    where = (q_offsets, kv_offsets, image_of)
    return torch.ops.fastvlm_cpu.attention(
        *(q, k, v, *where, seed, scale, softcap, causal, window, dropout_p, _dense(position_bias)),
        window_after,
    )


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
    position_bias: Tensor | None = None,
    need_bias: bool = False,
    window_after: int = 0,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (dense_last(x) for x in (grad_out, q, k, v))
    where = (q_offsets, kv_offsets, image_of)
    return torch.ops.fastvlm_cpu.attention_backward(
        *(*rows, *where, seed, scale, softcap, causal, window, dropout_p, _dense(position_bias)),
        *(*needs, need_bias, window_after, _dense(grad_lse)),
    )


def _cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    ancestry: Tensor | None,
    window: int,
    scale: float,
    softcap: float,
    position_bias: Tensor | None = None,
) -> Tensor:
    q, k_cache, v_cache = dense_last(q), dense_last(k_cache), dense_last(v_cache)
    lengths = lengths.contiguous()
    return torch.ops.fastvlm_cpu.cached_attention(
        *(q, k_cache, v_cache, lengths, ancestry, scale, softcap, window, _dense(position_bias))
    )


def _cached_attention_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    ancestry: Tensor | None,
    window: int,
    scale: float,
    softcap: float,
    position_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    q, k_cache, v_cache = dense_last(q), dense_last(k_cache), dense_last(v_cache)
    lengths = lengths.contiguous()
    return torch.ops.fastvlm_cpu.cached_attention_lse(
        *(q, k_cache, v_cache, lengths, ancestry, scale, softcap, window, _dense(position_bias))
    )


def _packed(run: Callable[..., Any], first: int) -> Kernel:
    """first: the place of q in the schema; k and v follow."""

    def unsupported(*args: Any) -> str | None:
        q, k, v = args[first : first + 3]
        if v.shape[2] != k.shape[2]:
            return "a head dimension of v that is not the one of k"
        return wrong_dtype(q)

    return Kernel("cpu", run, unavailable, unsupported)


def _cached_unsupported(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> str | None:
    if v_cache.shape[3] != k_cache.shape[3]:
        return "a head dimension of v_cache that is not the one of k_cache"
    return wrong_dtype(q)


KERNELS = {
    "cross_attention": _packed(_attention, 0),
    "cross_attention_backward": _packed(_attention_backward, 1),
    "self_attention": _packed(_attention, 0),
    "self_attention_backward": _packed(_attention_backward, 1),
    "cached_attention": Kernel("cpu", _cached_attention, unavailable, _cached_unsupported),
    "cached_attention_lse": Kernel("cpu", _cached_attention_lse, unavailable, _cached_unsupported),
}
