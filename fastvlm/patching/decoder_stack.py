"""Patched decoder stacks: build the Layouts, hand them down, leave the rest as it is.

As in `fastvlm.patching.encoder_stack`. A call with transformers' StaticCache has fixed shapes and
no layouts (`fastvlm.run.static`). With a foreign cache transformers' own path runs, unchanged;
several new tokens on a filled cache keep their self-attention there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPastAndCrossAttentions,
)

from fastvlm.compat import hf
from fastvlm.decoding import cache as cross_cache
from fastvlm.decoding import rows as beam_cache
from fastvlm.layout import Layout
from fastvlm.loss.request import knows_its_readers, loss_request, readers_for
from fastvlm.models.structure import layers_and_owner, part_of
from fastvlm.patching.encoder_stack import PatchedStack
from fastvlm.patching.interposed import (
    NOTHING,
    interposed,
    interposed_at_last,
)
from fastvlm.run import static
from fastvlm.run.build import run_step
from fastvlm.run.layouts import (
    READERS,
    Layouts,
    grid_of,
    hand,
    hides,
    is_2d,
    needs_columns,
    ones,
    restarts,
    visible_positions,
    wants_attentions,
    warn_of_zeros,
)
from fastvlm.run.mixin import by_name
from fastvlm.run.step import STEPS, is_plain_step


@dataclass
class DecoderInputs:
    """The arguments of one call of a decoder stack that the layouts are made from."""

    input_ids: Tensor | None
    attention_mask: Any
    past: Any
    inputs_embeds: Tensor | None
    encoder_states: Tensor | None
    encoder_mask: Any
    readers: Tensor | None = None  # int64 [B], the encoder row that each query row reads
    seen: Any = None  # a `fastvlm.run.seen.Seen`, where rows see some keys of an image


class DecoderStack(PatchedStack):
    """A causal decoder with its own cache and, where there is an encoder, cross-attention."""

    # a model that would repeat the encoder's states for its targets may hand the map down instead
    takes_readers = True
    reads_static_caches = True

    def _no_cross_mask(self) -> Any:
        return self._nothing_hidden(self.spec.cross_masks)

    def _read(self, states: Tensor | None, mask: Any) -> dict[str, Any]:
        """The arguments that say what cross-attention reads."""
        if not self.spec.reads_encoder:
            return {}
        named = self.spec.states
        masks = {named[1]: mask} if self.spec.masks_encoder else {}
        return {named[0]: states, **masks}

    def new_cache(self) -> Cache:
        """The cache that the model would make when asked to use one and given none."""
        own = self.new_own_cache()
        return EncoderDecoderCache(own, DynamicCache()) if self.spec.reads_encoder else own

    def new_own_cache(self) -> Cache:
        """The same for a decoder that has cross-attention and nothing to read."""
        return DynamicCache(config=self.config)

    def _wants_cache(self, use_cache: bool | None) -> bool:
        wanted = getattr(self.config, "use_cache", False) if use_cache is None else use_cache
        trains = self.training and (self._checkpoints() or not self.spec.trains_cached)
        return bool(wanted) and not trains

    def _checkpoints(self) -> bool:
        owners = (self, layers_and_owner(self)[1])
        return any(getattr(owner, "gradient_checkpointing", False) for owner in owners)

    def sees_all(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether rows are to see those behind them too, as whoever makes an encoder of a decoder
        says: transformers' masks go by the configuration, its attention by the call."""
        return not getattr(self.config, "is_causal", True) or kwargs.get("is_causal") is False

    def _is_causal(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether rows see only those before them in this call."""
        says = self.spec.causal
        if self.sees_all(kwargs):
            return False
        if says is None:
            return True
        named = says.startswith("config.")
        return bool(part_of(self, says) if named else kwargs.get(says, False))

    def _cross_mask(self, call: DecoderInputs) -> Any:
        """The mask that the encoder's states are read by."""
        return None if self.spec.ignores_cross_mask else call.encoder_mask

    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        given = dict(by_name(self.spec.arguments, args, kwargs))
        past = hf.cache_in(given)
        for name in ("past_key_values", hf.cache_argument()):
            given.pop(name, None)
        states = self.spec.states
        reads = [given.pop(n, None) for n in states] if self.spec.reads_encoder else [None, None]
        mask, embeds = given.pop("attention_mask", None), given.pop("inputs_embeds", None)
        call = DecoderInputs(input_ids, mask, past, embeds, *reads)
        return self._run(call, given.pop("use_cache", None), given)

    def _layouts(self, call: DecoderInputs, kwargs: Mapping[str, Any]) -> Layouts | None:
        """The layouts of this call, or None where transformers' own path must run."""
        batch, length, device = grid_of(call.input_ids, call.inputs_embeds)
        if call.input_ids is not None and call.input_ids.dim() != 2:
            return None
        if kwargs.get("encoder_hidden_states") is not None:  # where it has nothing to read them
            return None
        if length == 0 or not (is_2d(call.attention_mask) and is_2d(self._cross_mask(call))):
            return None
        filled = 0
        if call.past is not None:
            if not self._knows(call.past, call.encoder_states is not None):
                return None
            filled = call.past.get_seq_length()
        # what a cache began with it goes on with: it holds keys and values as those read them
        found = interposed(self) if filled == 0 else NOTHING
        if found.unfused is not None:
            return None
        mask = call.attention_mask
        inferred = mask is None and call.past is None
        if inferred:
            mask = self.default_mask(call.input_ids)
        if mask is not None and mask.shape != (batch, filled + length):
            return None
        if filled == 0 and needs_columns(self, mask):
            return None
        request = loss_request()
        labelled = request is not None and request.decoder is self
        if inferred and not labelled and hides(mask):
            return None  # the caller never called these rows padding, and may read them
        if mask is None and call.past is None and restarts(kwargs.get("position_ids")):
            return None  # several texts in a row, which transformers tells by their positions
        if filled == 0 and hides(mask) and not self._is_unread(mask, kwargs):
            # rows that nobody should see, and that somebody may read: as transformers computes them
            if self.spec.merged:
                return None
            cross = self._cross(call, None, batch, length, filled, device)
            return Layouts(cross=cross, fused_self=False)
        cross = self._cross(call, mask, batch, length, filled, device)
        if filled == 0:
            rows = Layout.from_padded(ones(batch, length, device) if mask is None else mask)
            packed = call.past is None and self._runs_packed(rows, kwargs, found)
            return Layouts(rows=rows, cross=cross, packed=packed)
        if length > 1:
            return None if self.spec.merged else Layouts(cross=cross, fused_self=False)
        return Layouts(cross=cross, visible=visible_positions(mask))

    def _is_unread(self, mask: Tensor, kwargs: Mapping[str, Any]) -> bool:
        """Whether nobody reads what it gives in rows that its mask [B, L] hides."""
        return knows_its_readers(self, mask)

    def _knows(self, past: Any, encodes: bool) -> bool:
        """A cache whose keys lie as the fused path reads them, or that is empty still.

        encodes: whether there are states of an encoder; without, a decoder's own cache will do.
        """
        two = isinstance(past, EncoderDecoderCache)
        if (two and not self.spec.reads_encoder) or (encodes and not two):
            return False
        parts = [past]
        if isinstance(past, EncoderDecoderCache):
            cross = past.cross_attention_cache
            if not cross_cache.is_shared(cross) and hf.cross_is_filled(past):
                return False
            parts = [past.self_attention_cache, cross]
        if not beam_cache.keeps_rows(parts[0]) and parts[0].get_seq_length() > 0:
            return False
        return all(type(part) is DynamicCache and not hf.is_offloaded(part) for part in parts)

    def _cross(
        self,
        call: DecoderInputs,
        mask: Tensor | None,
        batch: int,
        length: int,
        filled: int,
        device: torch.device,
    ) -> Layout | None:
        if not self.spec.reads_encoder or call.encoder_states is None:
            return None
        if filled > 0 or mask is None:
            mask = ones(batch, length, device)
        if filled > 0 and cross_cache.is_shared(call.past.cross_attention_cache):
            readers = cross_cache.readers_of(call.past.cross_attention_cache)
            if readers.layout is not None:
                return readers.step(batch, length, self._cross_mask(call), call.readers)
        images, tokens = call.encoder_states.shape[:2]
        kv_mask = self._cross_mask(call)
        if kv_mask is not None and filled == 0 and kv_mask.shape != (images, tokens):
            raise ValueError(
                f"fastvlm: attention_mask must be [{images}, {tokens}], as the encoder's states "
                f"are; got {list(kv_mask.shape)}"
            )
        if kv_mask is None:
            kv_mask = ones(images, tokens, device)
            if filled == 0:
                warn_of_zeros(call.encoder_states)
        return Layout.from_padded(mask, kv_mask, call.readers)

    def _run(self, call: DecoderInputs, use_cache: bool | None, kwargs: dict[str, Any]) -> Any:
        """super().forward with layouts where that is possible, as it came otherwise."""
        layouts, call.readers = None, kwargs.pop(READERS, None)
        if self.spec.reads_encoder:
            given = call.inputs_embeds if call.input_ids is None else call.input_ids
            call.readers = readers_for(self, given, call.readers)
        asks = wants_attentions(self, kwargs) or not self._is_causal(kwargs)
        if not self.spec.reads_encoder:
            asks = asks or kwargs.get("encoder_hidden_states") is not None
        if self.spec.wraps_cache and not asks and self._wants_cache(use_cache):
            call.past = _wrapped(call.past)
        if self.spec.drops_cache and call.past is not None:
            asks = asks or not self._wants_cache(use_cache)
        fixed = not asks and self._fixed(call.past)
        if not (asks or fixed):
            if call.past is None and self._wants_cache(use_cache):
                encodes = call.encoder_states is not None or self.config.is_encoder_decoder
                makes = self.new_cache if encodes else self.new_own_cache
                call.past = makes()
            layouts = self._layouts(call, kwargs)
        arguments: dict[str, Any] = {
            "input_ids": call.input_ids,
            "inputs_embeds": call.inputs_embeds,
            **hf.cached(call.past),
            "use_cache": use_cache,
            **kwargs,
        }
        if fixed and (layouts := self._static(call, arguments)) is not None:
            hand(arguments, layouts, self.spec.hands)
            return self._settled(super().forward(**arguments), layouts)
        if layouts is None:
            if static.is_fixed(call.past):
                dtype = part_of(self, self.spec.embedding.tokens).weight.dtype
                mask = static.additive(call.attention_mask, self.config, dtype)
                arguments["attention_mask"] = mask
            else:
                arguments["attention_mask"] = call.attention_mask
            arguments |= self._read(*self._expanded(call))
            return super().forward(**arguments)
        self._share(call.past)
        self._warn(call, layouts)
        arguments["attention_mask"] = self._no_mask() if layouts.fused_self else call.attention_mask
        arguments |= self._read(self._states_for(call, layouts), self._no_cross_mask())
        if call.past is not None and (layouts.rows is not None or not layouts.fused_self):
            STEPS.pop(call.past, None)  # a new prefill, perhaps of other images or weights
        if layouts.rows is None and layouts.fused_self:
            output = self._compiled(call, layouts, kwargs)
            if output is not None:
                return output
        self._pack_ids(arguments, layouts)
        hand(arguments, layouts, self.spec.hands)
        return self._settled(super().forward(**arguments), layouts)

    def _share(self, past: Any) -> None:
        """Turn a still empty cache into one whose rows stay, with an image once for its readers."""
        own = past
        if isinstance(past, EncoderDecoderCache):
            own, cross = past.self_attention_cache, past.cross_attention_cache
            if not cross_cache.is_shared(cross):
                cross_cache.share(cross)
        if own is not None and not beam_cache.keeps_rows(own):
            beam_cache.keep_rows(own)

    def _warn(self, call: DecoderInputs, layouts: Layouts) -> None:
        """What the stack's own forward says of a mask that it will not see."""
        if self.spec.warns and layouts.rows is not None and call.input_ids is not None:
            self.warn_if_padding_and_no_attention_mask(call.input_ids, call.attention_mask)

    def _states_for(self, call: DecoderInputs, layouts: Layouts) -> Tensor | None:
        """The encoder's states as the layers get them."""
        states = call.encoder_states
        if layouts.packed and layouts.cross is not None and states is not None:
            states = layouts.cross.pack_kv(states).unsqueeze(0)
        return states

    def _fixed(self, past: Any) -> bool:
        """Whether the patched attention reads this static cache, and nothing stands in its way."""
        if self.spec.merged or not static.knows(past, self.spec.reads_encoder):
            return False
        # with keys of an image once for all its rows, it goes on as it began
        begun = self.spec.reads_encoder and static.is_shared(past.cross_attention_cache)
        return begun or interposed_at_last(self).unfused is None

    def _static(self, call: DecoderInputs, arguments: dict[str, Any]) -> Layouts | None:
        """Fill in the arguments of a call with a static cache; None for transformers' own path."""
        arguments["attention_mask"] = call.attention_mask
        if not self.spec.reads_encoder:
            return Layouts(static=static.Static(None), marks=None)
        states, mask = call.encoder_states, self._cross_mask(call)
        batch = grid_of(call.input_ids, call.inputs_embeds)[0]
        if states is None or not is_2d(mask) or (call.readers is None and batch % len(states)):
            return None
        static.share(call.past, states.shape[1])
        arguments |= self._read(states, self._no_cross_mask())
        reads = static.readers(batch, states, mask, call.readers)
        return Layouts(static=static.Static(reads), marks=None)

    def _compiled(self, call: DecoderInputs, layouts: Layouts, kwargs: dict[str, Any]) -> Any:
        """The output of a decoding step that is written down; None where modules must be called."""
        ids = call.input_ids
        reads = self.spec.reads_encoder and not self.spec.interleaved
        if ids is None or (reads and layouts.cross is None):
            return None
        if any(kwargs.get(name) is not None for name in self.spec.embedding.told):
            return None
        if not is_plain_step(self, kwargs) or torch.is_autocast_enabled(ids.device.type):
            return None
        positions = kwargs.get("position_ids")
        embeds = partial(self._embeds, call, kwargs)
        states = run_step(self, ids, call.past, layouts, positions, embeds)
        return None if states is None else self._output(states, call.past)

    def _embeds(self, call: DecoderInputs, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with which transformers' forward embeds the tokens of a step."""
        return {
            "input_ids": call.input_ids,
            "attention_mask": self._no_mask(),
            "use_cache": False,
            **hf.cached(call.past),
            **kwargs,
            **self._read(call.encoder_states, self._no_cross_mask()),
        }

    def _output(self, states: Tensor, past: Any) -> Any:
        if "encoder_hidden_states" in self.spec.arguments:
            return BaseModelOutputWithPastAndCrossAttentions(
                last_hidden_state=states, **hf.cached(past)
            )
        return BaseModelOutputWithPast(last_hidden_state=states, **hf.cached(past))

    def _expanded(self, call: DecoderInputs) -> tuple[Tensor | None, Any]:
        """Encoder states and mask with one row per query row, as transformers' own path wants."""
        states, mask = call.encoder_states, call.encoder_mask
        batch = grid_of(call.input_ids, call.inputs_embeds)[0]
        if states is not None and call.readers is not None:
            states = states.index_select(0, call.readers)
            if isinstance(mask, Tensor):
                mask = mask.index_select(0, call.readers)
        elif states is not None and batch > states.shape[0] > 0:
            readers = batch // states.shape[0]
            states = states.repeat_interleave(readers, 0)
            if isinstance(mask, Tensor):
                mask = mask.repeat_interleave(readers, 0)
        return states, mask


def _wrapped(past: Any) -> Any:
    """A cache of a decoder's own rows, with an empty one for the encoder's beside it."""
    return EncoderDecoderCache(past, DynamicCache()) if type(past) is DynamicCache else past
