"""Decoding with transformers' StaticCache: every step has the shapes of the one before it.

This is what torch.compile and CUDA graphs want: one graph serves all steps. The cache stays
transformers', so that its own rules (lengths on the device, fixed addresses, sliding windows) hold;
the patched model reads it where it lies, and keeps cross-attention's keys and values once for an
image. Nothing here asks for a value of a tensor, and no layout is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from fastvlm import ops
from fastvlm.compat import attentions, hf
from fastvlm.decoding.prefixes import decoder_stack
from fastvlm.run.mixin import Mixin

StaticCache: Any = hf.cache_layer("StaticCache")
StaticLayer: Any = hf.cache_layer("StaticLayer")
StaticSlidingWindowLayer: Any = hf.cache_layer("StaticSlidingWindowLayer")


@dataclass(frozen=True)
class Static:
    """What the layers of one call need to know.

    cross: int32 [B, S], the encoder row that each query row reads at each of its positions, -1
    where that is padding; None without an encoder.
    """

    cross: Tensor | None


class SharedStaticLayer(StaticLayer):
    """Cross K/V of one layer, [images, Hkv, S, D], whatever the number of readers.

    Beams of an image only change places among themselves, so reordering has nothing to do.
    """

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        pass


def knows(past: Any, has_cross_attention: bool) -> bool:
    """Whether this is a static cache that the patched attention reads."""
    if has_cross_attention != isinstance(past, EncoderDecoderCache):
        return False
    own = past.self_attention_cache if has_cross_attention else past
    if not _is_static(own):
        return False
    if any(type(layer) not in (StaticLayer, StaticSlidingWindowLayer) for layer in own.layers):
        return False
    if not has_cross_attention:
        return True
    cross = past.cross_attention_cache
    # filled by transformers' own path, with a row for each reader
    return _is_static(cross) and (is_shared(cross) or not hf.cross_is_filled(past))


def _is_static(cache: Any) -> bool:
    return type(cache) is StaticCache and not hf.is_offloaded(cache)


def is_fixed(past: Any) -> bool:
    """Whether generate() may have made the masks of a call with this cache in `StaticMasks`."""
    return past is not None and bool(getattr(past, "is_compileable", True))


def is_shared(cross: Cache) -> bool:
    """Whether a cross-attention cache holds an image once, whatever the number of its readers."""
    return bool(cross.layers) and all(type(layer) is SharedStaticLayer for layer in cross.layers)


def share(past: EncoderDecoderCache, length: int) -> None:
    """Turn a still empty cross-attention cache into one with a row for each image.

    It keeps the room that it has, and is made anew for a longer prompt. ValueError where it holds a
    shorter one already.
    """
    cross = past.cross_attention_cache
    lengths = [layer.max_cache_len for layer in cross.layers]
    room = min(lengths) if lengths else 0
    if is_shared(cross) and length <= room:
        return
    if hf.cross_is_filled(past):
        raise ValueError(
            f"fastvlm: encoder_outputs must be those of which past_key_values holds the keys; got "
            f"{length} positions for a cross-attention cache of {room}: past_key_values.reset() "
            "comes before another prompt"
        )
    cross.layers = [SharedStaticLayer(max_cache_len=max(length, room)) for _ in cross.layers]


def readers(batch: int, states: Tensor, mask: Tensor | None, of_row: Tensor | None) -> Tensor:
    """`Static.cross` of encoder states [I, S, d]; of_row: the encoder row of each query row."""
    images, length = states.shape[:2]
    if of_row is None:
        of_row = torch.arange(batch, device=states.device) // (batch // images)
    found = of_row.to(torch.int32).unsqueeze(1)
    if mask is None:
        return found.expand(batch, length)
    return torch.where(mask[of_row] != 0, found, -1)


def serves(mask: Any, length: int) -> bool:
    """Whether this is a step of one token with a mask that only says which positions are seen."""
    return length == 1 and isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.bool


def self_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    cache: Any,
    layer_idx: int,
    *,
    scale: float,
    softcap: float | None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """q [B, 1, H, D], k, v [B, 1, Hkv, D], mask bool [B or 1, 1, 1, T] -> [B, 1, H * D].

    k and v go into the cache, where the new token is the last that its row sees. A window needs no
    mention: the mask leaves out what is before it.
    """
    keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), layer_idx)
    batch, time = q.shape[0], keys.shape[2]
    visible = mask[:, 0, 0].expand(batch, time)
    rows = torch.arange(batch, dtype=torch.int32, device=q.device).unsqueeze(1)
    stops = torch.arange(1, time + 1, dtype=torch.int32, device=q.device)
    out = ops.cached_attention(
        q[:, 0],
        keys.transpose(1, 2),
        values.transpose(1, 2),
        torch.where(visible, stops, 0).amax(1),
        ancestry=torch.where(visible, rows, -1),
        scale=scale,
        softcap=softcap,
        position_bias=position_bias,
    )
    return out.flatten(1).unsqueeze(1)


def cross_attend(
    module: Any,
    q: Tensor,
    encoder_states: Tensor,
    static: Static,
    cache: EncoderDecoderCache,
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """q [B, L, H, D] against the encoder's [I, S, d] -> [B, L, H * D]."""
    index, reads = module.layer_idx, static.cross
    assert reads is not None
    if hf.cross_is_filled(cache, index):
        layer = cache.cross_attention_cache.layers[index]
        keys, values = layer.keys, layer.values
    else:
        new = (part.transpose(1, 2) for part in module.keys_values(encoder_states))
        keys, values = cache.cross_attention_cache.update(*new, index)
        hf.set_cross_filled(cache, index)
    (batch, length), slots = q.shape[:2], reads.shape[1]
    if length > 1:
        reads = reads.repeat_interleave(length, 0)
    out = ops.cached_attention(
        q.flatten(0, 1),
        keys.transpose(1, 2)[:, :slots],
        values.transpose(1, 2)[:, :slots],
        torch.full((batch * length,), slots, dtype=torch.int32, device=q.device),
        ancestry=reads,
        scale=scale,
        softcap=softcap,
    )
    return out.flatten(1).unflatten(0, (batch, length))


def additive(mask: Any, config: Any, dtype: torch.dtype) -> Any:
    """A mask of `StaticMasks`, or a dict of them, as transformers' eager attention adds it."""
    if attentions.attention_of(config) != "eager":
        return mask
    if isinstance(mask, dict):
        return {name: additive(each, config, dtype) for name, each in mask.items()}
    if not (isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.bool):
        return mask
    hidden = torch.tensor(torch.finfo(dtype).min, dtype=dtype, device=mask.device)
    return torch.where(mask, torch.zeros_like(hidden), hidden)


class StaticMasks(Mixin):
    """generate() makes the masks of steps on a static cache here: which positions a row sees.

    For eager attention transformers makes them something to add, and what a sum may hold besides
    cannot be told.
    """

    def create_masks_for_generate(self, config: Any, **kwargs: Any) -> Any:
        make: Any = getattr(super(), "create_masks_for_generate", attentions.mask_maker())
        text, embeds = config.get_text_config(), kwargs.get("inputs_embeds")
        step = embeds is not None and embeds.shape[1] == 1
        fused = getattr(decoder_stack(self), "reads_static_caches", False)
        if step and fused and attentions.attention_of(text) == "eager":
            config = attentions.config_with_attention(text, "sdpa")
        return make(config=config, **kwargs)
