"""Decoders in which some layers read images and the others the text (Mllama).

One cache holds the keys of both kinds of layers, and a mask says for each row of the text which
keys of the images it sees (`fastvlm.run.seen`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from fastvlm.compat import attentions, hf
from fastvlm.decoding import cache as cross_cache
from fastvlm.decoding import rows as beam_cache
from fastvlm.models.mllama import FACTORS
from fastvlm.models.structure import layer_in, layers_of
from fastvlm.patching.decoder_stack import DecoderInputs, DecoderStack
from fastvlm.run.layouts import Layouts, grid_of, ones
from fastvlm.run.seen import seen_by, visible_keys
from fastvlm.run.step import STEPS


class _LeftAlone(Exception):
    """A call that transformers' own path computes."""


class InterleavedStack(DecoderStack):
    """A decoder whose cross-attention stands in layers of its own."""

    takes_readers = False
    reads_static_caches = False

    def new_cache(self) -> Cache:
        return self.new_own_cache()

    def _cross_layers(self) -> list[int]:
        """The places of the layers that read images."""
        name = self.spec.attentions[1]
        layers = enumerate(layers_of(self))
        return [index for index, layer in layers if layer_in(layer, name) is not None]

    def _knows(self, past: Any, encodes: bool) -> bool:
        if type(past) is not DynamicCache or hf.is_offloaded(past):
            return False
        kept = [cross_cache.cross_layer(past, index) is not None for index in self._cross_layers()]
        if beam_cache.keeps_rows(past):
            return all(kept)
        return not any(layer.is_initialized for layer in past.layers)

    def _share(self, past: Any) -> None:
        if past is None or beam_cache.keeps_rows(past):
            return
        beam_cache.keep_rows(past)
        beam_cache.layer_of(past, len(layers_of(self)) - 1)
        cross_cache.interleave(past, self._cross_layers())

    def _kept(self, past: Any) -> Any:
        """The first layer of a cache that holds keys of images; None where none does."""
        kept = [cross_cache.cross_layer(past, index) for index in self._cross_layers()]
        return kept[0] if kept and kept[0] is not None and kept[0].packed is not None else None

    def _layouts(self, call: DecoderInputs, kwargs: Mapping[str, Any]) -> Layouts | None:
        batch, length, _ = grid_of(call.input_ids, call.inputs_embeds)
        factors = kwargs.get(FACTORS)
        if factors is not None and tuple(factors.shape) != (batch, 1, length, 1):
            return None
        try:
            found = super()._layouts(call, kwargs)
        except _LeftAlone:
            return None
        return None if found is None else replace(found, seen=call.seen)

    def _cross(
        self,
        call: DecoderInputs,
        mask: Tensor | None,
        batch: int,
        length: int,
        filled: int,
        device: torch.device,
    ) -> Any:
        """The layout of what rows read; `DecoderInputs.seen` says which keys that are."""
        kept, states = self._kept(call.past), call.encoder_states
        if kept is None and states is None:
            return None
        step = filled > 0 and length == 1 and states is None
        readers: Any = None if kept is None else kept.readers
        if readers is not None:
            readers.handed.settle()
        if step and readers is not None and self._saw(readers.seen, call.encoder_mask, batch):
            call.seen = readers.seen[0]
            return call.seen.layout
        tokens = ones(batch, length, device) if filled > 0 or mask is None else mask != 0
        images = None if readers is None else readers.images(batch)
        keys = 0 if readers is None else readers.layout.max_kv
        if states is not None:
            new = self._keys_of(call, states, batch)
            count = states.numel() // states.shape[-1] // new
            if images is not None and count != readers.layout.num_images:
                raise ValueError(
                    f"fastvlm: {self.spec.states[0]} must be of the {readers.layout.num_images} "
                    f"texts that past_key_values began with; got those of {count}"
                )
            if images is None:
                images = [row // (batch // count) for row in range(batch)]
            keys += new
        assert images is not None
        texts = max(images, default=-1) + 1 if readers is None else readers.layout.num_images
        visible = self._visible(call, batch, length, keys)
        seen = seen_by(tokens, images, [keys] * texts, visible)
        call.seen = seen
        if step and readers is not None:
            readers.seen = seen, call.encoder_mask
            STEPS.pop(call.past, None)  # its program reads other keys
        return seen.layout

    def _saw(self, seen: Any, mask: Any, batch: int) -> bool:
        """Whether a step sees what the last one did."""
        if seen is None or seen[0].layout.num_segments != batch:
            return False
        known = seen[1]
        if known is None or mask is None:
            return known is mask
        return known.shape == mask.shape and torch.equal(known, mask)

    def _keys_of(self, call: DecoderInputs, states: Tensor, batch: int) -> int:
        """How many keys the states of each text's images make."""
        rows, mask, kept = states.numel() // states.shape[-1], call.encoder_mask, None
        keys = rows // batch
        if isinstance(mask, Tensor):
            kept = self._kept(call.past)
            keys = mask.shape[-1] - (0 if kept is None else kept.readers.layout.max_kv)
        count = rows // keys if keys > 0 and rows % keys == 0 else 0
        if not count or batch % count:
            raise _LeftAlone
        return keys

    def _visible(self, call: DecoderInputs, batch: int, length: int, keys: int) -> Tensor | None:
        """bool [B, L, K]; None where all keys are seen."""
        mask = call.encoder_mask
        if mask is None:
            # without a mask transformers' sdpa takes this attention for a causal one
            if length > 1 and attentions.attention_of(self.config) != "eager":
                raise _LeftAlone
            return None
        seen = visible_keys(mask) if isinstance(mask, Tensor) else None
        if seen is None or tuple(seen.shape) != (batch, length, keys):
            raise _LeftAlone
        return seen

    def _run(self, call: DecoderInputs, use_cache: bool | None, kwargs: dict[str, Any]) -> Any:
        factors = kwargs.get(FACTORS)
        if isinstance(factors, Tensor) and not factors.is_meta and bool((factors == 1).all()):
            kwargs = {**kwargs, FACTORS: None}
        return super()._run(call, use_cache, kwargs)

    def _states_for(self, call: DecoderInputs, layouts: Layouts) -> Tensor | None:
        states = call.encoder_states
        return None if states is None else states.reshape(1, -1, states.shape[-1])

    def _pack_ids(self, arguments: dict[str, Any], layouts: Layouts) -> None:
        super()._pack_ids(arguments, layouts)
        factors = arguments.get(FACTORS)
        if layouts.packed and layouts.rows is not None and factors is not None:
            arguments[FACTORS] = layouts.rows.pack(factors[:, 0])[None, None]

    def _compiled(self, call: DecoderInputs, layouts: Layouts, kwargs: dict[str, Any]) -> Any:
        if call.encoder_states is not None:
            if call.past is not None:
                STEPS.pop(call.past, None)
            return None
        if kwargs.get(FACTORS) is not None:
            return None
        return super()._compiled(call, layouts, kwargs)

    def _expanded(self, call: DecoderInputs) -> tuple[Tensor | None, Any]:
        """generate() of a patched model gives each image once, whatever the number of beams."""
        states, mask = call.encoder_states, call.encoder_mask
        batch = grid_of(call.input_ids, call.inputs_embeds)[0]
        if states is None or not isinstance(mask, Tensor) or self._kept(call.past) is not None:
            return states, mask
        keys, rows = mask.shape[-1], states.numel() // states.shape[-1]
        if not keys or rows % keys or rows == batch * keys or batch % (rows // keys):
            return states, mask
        states = states.reshape(rows // keys, keys, states.shape[-1])
        return states.repeat_interleave(batch * keys // rows, 0), mask
