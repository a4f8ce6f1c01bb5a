"""Patched encoder stacks, and what they share with decoders: Layouts are built and handed down.

A call without a cache (training) runs packed from the first layer to the last, where all layers
can: padding is neither computed nor differentiated. Where a call asks for something the fused path
does not do (attention probabilities, a mask that is not [batch, length]), transformers' own path
runs, unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastvlm.layout import Layout
from fastvlm.models.spec import Stack
from fastvlm.patching.interposed import Interposed, check_taken, interposed
from fastvlm.run.layouts import (
    KEYWORD,
    READERS,
    Layouts,
    grid_of,
    hides,
    is_2d,
    needs_columns,
    ones,
    packed_positions,
    wants_attentions,
    wants_hidden_states,
    zero_padding,
)
from fastvlm.run.mixin import Mixin, by_name


class PatchedStack(Mixin):
    """What encoders and decoders share."""

    keeps_signature = True
    spec: Stack

    def default_mask(self, input_ids: Tensor | None) -> Tensor | None:
        """The mask that the model itself assumes when none is given; None is all ones."""
        pad = self.config.pad_token_id if self.spec.hides_pads else None
        return None if input_ids is None or pad is None else input_ids != pad

    def _no_mask(self) -> Any:
        """What to pass as attention_mask so that transformers builds no 4-D mask."""
        return self._nothing_hidden(self.spec.masks)

    def _nothing_hidden(self, kinds: tuple[str, ...]) -> Any:
        if not self.spec.empty_mask:
            return dict.fromkeys(kinds) or None
        # of a shape that fits no scores: nobody reads it in silence
        empty = torch.empty(1, 1, 0, 0, dtype=torch.bool)
        return dict.fromkeys(kinds, empty) or empty

    def _runs_packed(self, rows: Layout, kwargs: Mapping[str, Any], found: Interposed) -> bool:
        """Whether there is padding, and every layer can do without it."""
        if rows.q_padding is None or rows.q_padding.index is None:
            return False
        if found.padded is not None or wants_hidden_states(self, kwargs):
            return False
        return self.spec.packs_ids or all(
            getattr(layer, "runs_packed", False) for layer in self.layers
        )

    def _settled(self, output: Any, layouts: Layouts) -> Any:
        """The output of a call in which every attention took its layouts, zeros at padding."""
        if layouts.marks is not None:
            check_taken(self, layouts.marks, layouts.has_cross)
        return zero_padding(output, layouts)

    def _pack_ids(self, arguments: dict[str, Any], layouts: Layouts) -> None:
        """Token ids or embeddings and positions of the tokens alone, in place."""
        rows = layouts.rows
        if not layouts.packed or not self.spec.packs_ids or rows is None:
            return
        for name in ("input_ids", "inputs_embeds", *self.spec.embedding.told):
            if arguments.get(name) is not None:
                arguments[name] = rows.pack(arguments[name]).unsqueeze(0)
        arguments["position_ids"] = packed_positions(arguments.get("position_ids"), rows)


class EncoderStack(PatchedStack):
    """A bidirectional text encoder."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        kwargs.pop(READERS, None)  # the decoder's
        batch, length, device = grid_of(input_ids, inputs_embeds)
        plain = not args and length > 0 and is_2d(attention_mask)
        if plain and attention_mask is not None:
            plain = attention_mask.shape == (batch, length)
        found = interposed(self)
        if not plain or found.unfused is not None or wants_attentions(self, kwargs):
            return super().forward(
                input_ids, attention_mask, *args, inputs_embeds=inputs_embeds, **kwargs
            )
        mask = self.default_mask(input_ids) if attention_mask is None else attention_mask
        # who was given no mask, cross-attention too, reads the states of padding as well
        unhidden = attention_mask is None and hides(mask)
        if unhidden or needs_columns(self, mask):
            return super().forward(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        rows = Layout.from_padded(ones(batch, length, device) if mask is None else mask)
        layouts = Layouts(rows=rows, packed=self._runs_packed(rows, kwargs, found))
        arguments = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, **kwargs}
        self._pack_ids(arguments, layouts)
        arguments |= {"attention_mask": self._no_mask(), KEYWORD: layouts}
        return self._settled(super().forward(**arguments), layouts)


class FrameEncoderStack(PatchedStack):
    """An encoder of frames that convolutions make of what it is given; none is padding."""

    def forward(self, input_features: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(READERS, None)  # the decoder's
        given = by_name(self.spec.arguments, args, kwargs)
        masked = given.get("attention_mask") is not None and not self.spec.ignores_mask
        if masked or interposed(self).unfused is not None or wants_attentions(self, given):
            return super().forward(input_features, **given)
        # as many frames as there are positions: another number is refused
        frames = getattr(self, str(self.spec.embedding.positions)).weight.shape[0]
        rows = Layout.from_padded(ones(input_features.shape[0], frames, input_features.device))
        layouts = Layouts(rows=rows)
        return self._settled(
            super().forward(input_features, **{**given, KEYWORD: layouts}), layouts
        )
