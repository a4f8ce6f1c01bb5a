"""Patched encoder and decoder stacks: build the Layouts, hand them down, leave the rest as it is.

Where a call asks for something the fused path does not do (attention probabilities, a mask that is
not [batch, length], a static or foreign cache), transformers' own path runs, unchanged; several new
tokens on a filled cache keep their self-attention there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from fastvlm.decoding import cache as shared
from fastvlm.layout import Layout
from fastvlm.patching.layouts import (
    KEYWORD,
    Layouts,
    is_2d,
    ones,
    visible_positions,
    wants_attentions,
    window_needs_columns,
    zero_padding,
)
from fastvlm.patching.rules import Host


def _grid(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int, torch.device]:
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        return 0, 0, torch.device("cpu")
    return given.shape[0], given.shape[1], given.device


class EncoderStack(Host):
    """A bidirectional text encoder."""

    def default_mask(self, input_ids: Tensor | None) -> Tensor | None:
        """The mask that the model itself assumes when none is given; None is all ones."""
        return None

    def no_mask(self) -> Any:
        """What to pass as attention_mask so that transformers builds no 4-D mask."""
        return None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        batch, length, device = _grid(input_ids, inputs_embeds)
        plain = not args and length > 0 and is_2d(attention_mask)
        if not plain or wants_attentions(self, kwargs):
            return super().forward(
                input_ids, attention_mask, *args, inputs_embeds=inputs_embeds, **kwargs
            )
        mask = self.default_mask(input_ids) if attention_mask is None else attention_mask
        if window_needs_columns(self, mask):
            return super().forward(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        layout = Layout.from_padded(ones(batch, length, device) if mask is None else mask)
        kwargs[KEYWORD] = Layouts(rows=layout)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=self.no_mask(),
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return zero_padding(output, layout)


@dataclass
class Call:
    """The arguments of one call of a decoder stack that the layouts are made from."""

    input_ids: Tensor | None
    attention_mask: Any
    past: Any
    inputs_embeds: Tensor | None
    encoder_states: Tensor | None
    encoder_mask: Any


class DecoderStack(Host):
    """A causal decoder with its own cache and, where there is an encoder, cross-attention."""

    has_cross_attention = False

    def default_mask(self, input_ids: Tensor | None) -> Tensor | None:
        """The mask that the model itself assumes when none is given; None is all ones."""
        return None

    def no_mask(self) -> Any:
        """What to pass as attention_mask so that transformers builds no 4-D mask."""
        return None

    def no_cross_mask(self) -> Any:
        return None

    def new_cache(self) -> Cache:
        """The cache that the model would make when asked to use one and given none."""
        raise NotImplementedError

    def _wants_cache(self, use_cache: bool | None) -> bool:
        wanted = getattr(self.config, "use_cache", False) if use_cache is None else use_cache
        return bool(wanted) and not (self.gradient_checkpointing and self.training)

    def _layouts(self, call: Call) -> Layouts | None:
        """The layouts of this call, or None where transformers' own path must run."""
        batch, length, device = _grid(call.input_ids, call.inputs_embeds)
        if length == 0 or not (is_2d(call.attention_mask) and is_2d(call.encoder_mask)):
            return None
        filled = 0
        if call.past is not None:
            if not self._knows(call.past):
                return None
            filled = call.past.get_seq_length()
        mask = call.attention_mask
        if mask is None and call.past is None:
            mask = self.default_mask(call.input_ids)
        if mask is not None and mask.shape != (batch, filled + length):
            return None
        if filled == 0 and window_needs_columns(self, mask):
            return None
        cross = self._cross(call, mask, batch, length, filled, device)
        if filled == 0:
            rows = Layout.from_padded(ones(batch, length, device) if mask is None else mask)
            return Layouts(rows=rows, cross=cross)
        if length > 1:
            return Layouts(cross=cross, fused_self=False)
        return Layouts(cross=cross, visible=visible_positions(mask))

    def _knows(self, past: Any) -> bool:
        """A cache whose keys lie as the fused path reads them."""
        if self.has_cross_attention != isinstance(past, EncoderDecoderCache):
            return False
        parts = [past]
        if isinstance(past, EncoderDecoderCache):
            cross = past.cross_attention_cache
            if not shared.is_shared(cross) and any(past.is_updated.values()):
                return False
            parts = [past.self_attention_cache, cross]
        return all(type(part) is DynamicCache and not part.offloading for part in parts)

    def _cross(
        self,
        call: Call,
        mask: Tensor | None,
        batch: int,
        length: int,
        filled: int,
        device: torch.device,
    ) -> Layout | None:
        if not self.has_cross_attention or call.encoder_states is None:
            return None
        if filled > 0 or mask is None:
            mask = ones(batch, length, device)
        # a decoding step has the same layout each time: kept beside the cache it belongs to
        known: dict[tuple[int, int], Layout] = {}
        if call.past is not None:
            known = call.past.cross_attention_cache.__dict__.setdefault("fastvlm_layouts", {})
        key = (batch, length)
        if filled == 0:
            known.clear()  # a new prefill, perhaps of a cache that was reset
        elif key in known:
            return known[key]
        images, tokens = call.encoder_states.shape[:2]
        kv_mask = call.encoder_mask
        kv_mask = ones(images, tokens, device) if kv_mask is None else kv_mask
        layout = Layout.from_padded(mask, kv_mask)
        if filled > 0:
            known[key] = layout
        return layout

    def _run(self, call: Call, use_cache: bool | None, kwargs: dict[str, Any]) -> Any:
        """super().forward with layouts where that is possible, as it came otherwise."""
        layouts = None
        if not wants_attentions(self, kwargs):
            alone = self.has_cross_attention and call.encoder_states is None
            if call.past is None and self._wants_cache(use_cache) and not alone:
                call.past = self.new_cache()
            layouts = self._layouts(call)
        arguments: dict[str, Any] = {
            "input_ids": call.input_ids,
            "inputs_embeds": call.inputs_embeds,
            "past_key_values": call.past,
            "use_cache": use_cache,
            **kwargs,
        }
        if layouts is None:
            arguments["attention_mask"] = call.attention_mask
            if self.has_cross_attention:
                states, mask = self._expanded(call)
                arguments.update(encoder_hidden_states=states, encoder_attention_mask=mask)
            return super().forward(**arguments)
        if isinstance(call.past, EncoderDecoderCache):
            cross = call.past.cross_attention_cache
            if not shared.is_shared(cross):
                shared.share(cross)
        arguments["attention_mask"] = self.no_mask() if layouts.fused_self else call.attention_mask
        if self.has_cross_attention:
            arguments["encoder_hidden_states"] = call.encoder_states
            arguments["encoder_attention_mask"] = self.no_cross_mask()
        arguments[KEYWORD] = layouts
        return zero_padding(super().forward(**arguments), layouts.rows)

    def _expanded(self, call: Call) -> tuple[Tensor | None, Any]:
        """Encoder states and mask with one row per query row, as transformers' own path wants."""
        states, mask = call.encoder_states, call.encoder_mask
        batch = _grid(call.input_ids, call.inputs_embeds)[0]
        if states is not None and batch > states.shape[0] > 0:
            readers = batch // states.shape[0]
            states = states.repeat_interleave(readers, 0)
            if isinstance(mask, Tensor):
                mask = mask.repeat_interleave(readers, 0)
        return states, mask


class SharedEncoderStates(Host):
    """generate() without a copy of the encoder's states for each beam or returned sequence."""

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        states = model_kwargs.get("encoder_outputs")
        if not is_encoder_decoder or expand_size == 1 or states is None:
            return expand(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        kept = {
            name: model_kwargs.pop(name)
            for name in ("encoder_outputs", "attention_mask")
            if name in model_kwargs
        }
        input_ids, expanded = expand(
            expand_size, True, input_ids, encoder_outputs={}, **model_kwargs
        )
        expanded.update(kept)
        return input_ids, expanded
