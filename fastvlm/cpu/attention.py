"""Launchers of csrc/cpu/attention.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm.cpu.common import dense_last, unavailable, wrong_dtype
from fastvlm.ops.dispatch import Kernel


def _unsupported(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    if rest[3] is not None:
        return "dropout of attention probabilities has no CPU kernel"
    return wrong_dtype(q)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    image_of: Tensor,
    seed: Tensor | None,
    max_q: int,
    max_kv: int,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    return torch.ops.fastvlm_cpu.attention(
        q, k, v, q_offsets, kv_offsets, image_of, scale, softcap, causal, window
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
) -> Tensor:
    q, k_cache, v_cache = dense_last(q), dense_last(k_cache), dense_last(v_cache)
    lengths = lengths.contiguous()
    return torch.ops.fastvlm_cpu.cached_attention(
        q, k_cache, v_cache, lengths, ancestry, scale, softcap, window
    )


_PACKED = Kernel("cpu", _attention, unavailable, _unsupported)

KERNELS = {
    "cross_attention": _PACKED,
    "self_attention": _PACKED,
    "cached_attention": Kernel(
        "cpu", _cached_attention, unavailable, lambda q, *rest: wrong_dtype(q)
    ),
}
