"""A decoder stack with a head of its own, which gives logits, and a loss (Pix2Struct).

What is behind its layers reads the padded grid: the last layer gives it, zeros at padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from fastvlm.compat import hf
from fastvlm.models.structure import layers_of
from fastvlm.patching.decoder_stack import DecoderInputs, DecoderStack
from fastvlm.patching.interposed import check_taken, layer_of
from fastvlm.patching.padded_labels import hides_labels
from fastvlm.run.layouts import Layouts


class HeadedStack(DecoderStack):
    """A decoder that gives logits, and a loss where it is given labels."""

    def _layouts(self, call: DecoderInputs, kwargs: Mapping[str, Any]) -> Layouts | None:
        found = super()._layouts(call, kwargs)
        last = layer_of(layers_of(self)[-1], self.spec)
        return None if found is None else replace(found, last=last)

    def _is_unread(self, mask: Tensor, kwargs: Mapping[str, Any]) -> bool:
        labels = kwargs.get("labels")
        return (
            super()._is_unread(mask, kwargs) if labels is None else not hides_labels(mask, labels)
        )

    def _settled(self, output: Any, layouts: Layouts) -> Any:
        marks = layouts.marks
        if marks is not None:
            check_taken(self, marks, layouts.has_cross)
            left = marks.unknown or id(layouts.last) in marks.layers
            if layouts.packed and not left:
                raise RuntimeError(
                    f"fastvlm: the last layer of {type(self).__name__} did not run, and what is "
                    "behind it got rows without padding; fastvlm.unpatch(model) runs it"
                )
        return output

    def _compiled(self, call: DecoderInputs, layouts: Layouts, kwargs: dict[str, Any]) -> Any:
        return (
            None if kwargs.get("labels") is not None else super()._compiled(call, layouts, kwargs)
        )

    def _output(self, states: Tensor, past: Any) -> Any:
        logits = getattr(self, str(self.spec.head))(states)
        return CausalLMOutputWithCrossAttentions(logits=logits, **hf.cached(past))
