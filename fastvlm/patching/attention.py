"""What the attention modules of all families share: projected heads in, attended heads out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from fastvlm import ops
from fastvlm.compat import hf
from fastvlm.decoding import cache as cross_cache
from fastvlm.decoding import rows as beam_cache
from fastvlm.patching import static
from fastvlm.patching.layouts import Layouts


def heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim))


def self_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layouts: Layouts,
    cache: Any,
    layer_idx: int,
    *,
    mask: Any,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
) -> Tensor:
    """q [B, L, H, D], k, v [B, L, Hkv, D] -> [B, L, H * D]; appends to a cache.

    In a packed stack B is 1 and L all tokens of the batch. mask: transformers', for a static cache.
    """
    if layouts.static is not None:
        return static.self_attend(q, k, v, mask, cache, layer_idx, scale=scale, softcap=softcap)
    if cache is not None:
        layer = beam_cache.layer_of(cache, layer_idx)
        keys, values = layer.append(k, v)
        if layouts.rows is None:
            ancestry = layer.rows.ancestry
            if layouts.visible is not None:
                seen = layouts.visible
                ancestry = seen if ancestry is None else torch.where(seen < 0, seen, ancestry)
            assert layer.rows.lengths is not None
            out = ops.cached_attention(
                q[:, 0],
                keys,
                values,
                layer.rows.lengths,
                ancestry=ancestry,
                window=window,
                scale=scale,
                softcap=softcap,
            )
            return out.flatten(1).unsqueeze(1)
    rows = layouts.rows
    assert rows is not None  # a decoding step always has a cache
    out = ops.self_attention(
        layouts.pack(q),
        layouts.pack(k),
        layouts.pack(v),
        rows,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
    )
    return layouts.unpack(out.flatten(1))


def cross_attend(
    module: Any,
    q: Tensor,
    encoder_states: Tensor,
    layouts: Layouts,
    cache: Any,
    *,
    softcap: float | None,
    dropout_p: float,
) -> Tensor:
    """q [R, L, H, D] against the encoder's [I, S, d] -> [R, L, H * D].

    In a packed stack R and I are 1, L and S all tokens. K/V are projected once per image, packed,
    and kept in the shared cross cache if there is one.
    """
    if layouts.static is not None:
        return static.cross_attend(
            module, q, encoder_states, layouts.static, cache, softcap=softcap
        )
    layout = layouts.cross
    assert layout is not None
    index = module.layer_idx
    k = v = None
    if isinstance(cache, EncoderDecoderCache):
        layer = cross_cache.layer_of(cache.cross_attention_cache, index)
        if layer.packed is not None:
            k, v = layer.packed
    if k is None or v is None:
        states = layouts.packed_states(encoder_states)
        k = heads(module.k_proj(states), module.head_dim)
        v = heads(module.v_proj(states), module.head_dim)
        if isinstance(cache, EncoderDecoderCache):
            layer.fill(k, v, layout, module)
            hf.set_cross_filled(cache, index)
    out = ops.cross_attention(
        layouts.pack(q),
        k,
        v,
        layout,
        scale=module.scaling,
        softcap=softcap,
        dropout_p=dropout_p,
    )
    return layouts.unpack(out.flatten(1))
