"""Gemma-2 layers with a gated cross-attention between their branches (arXiv 2503.09443)."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from fastvlm.compat import hf
from fastvlm.models import florenz as models
from fastvlm.models.structure import first_layer, hands_down, has
from fastvlm.nn.wrapped import unwrapped
from fastvlm.patching import gemma2, t5gemma
from fastvlm.patching.layouts import entered
from fastvlm.patching.rules import Rule, StackRule, Swap, mistaken
from fastvlm.patching.stacks import DecoderInputs


class FlorenzLayer(gemma2.SandwichLayer):
    @hf.takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        encoder_attention_mask: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        entered(kwargs, self)
        own = past_key_values
        if isinstance(own, EncoderDecoderCache):
            own = own.self_attention_cache
        x, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **hf.cached(own),
            **kwargs,
        )
        if encoder_hidden_states is None:
            norms = self.post_attention_layernorm, self.pre_feedforward_layernorm
            h, x = self._tail(x, hidden_states, *norms)
            return self._mlp(x, h)
        h = self._tail(x, hidden_states, self.post_attention_layernorm)
        x, _ = self.encoder_attn(
            h,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            **hf.cached(past_key_values),
            **kwargs,
        )
        norms = self.post_encoder_attention_layernorm, self.pre_feedforward_layernorm
        h, x = self._tail(x, h, *norms, gate=self.encoder_attn_gate)
        return self._mlp(x, h)


class FlorenzDecoder(gemma2.GemmaSteps):
    has_cross_attention = True
    attentions = ("self_attn", "encoder_attn")
    spec = models.STACK

    def no_mask(self) -> Any:
        return dict(gemma2.MASKLESS)

    def new_cache(self) -> EncoderDecoderCache:
        return EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache())

    @hf.takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        call = DecoderInputs(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
        )
        return self._run(call, use_cache, {"position_ids": position_ids, **kwargs})


_LAYER = ("self_attn", "encoder_attn", "encoder_attn_gate", "post_feedforward_layernorm")


def _is_stack(module: Any) -> bool:
    if not has("layers", "norm", "rotary_emb", "embed_tokens")(module):
        return False
    layer = first_layer(module, "encoder_attn_gate")
    return layer is not None and has(*_LAYER)(layer)


def _choose_stack(module: Any) -> Swap | str:
    cross_attention, *_ = t5gemma.RULES
    for index, outer in enumerate(module.layers):
        layer = unwrapped(outer, "encoder_attn_gate")
        if layer is None or not has(*_LAYER)(layer):
            return f"its layer {index} has no gated cross-attention"
        cross = unwrapped(layer.encoder_attn, "q_proj")
        if cross is None or not cross_attention.matches(cross):
            return f"the encoder_attn of its layer {index} is not like T5Gemma's cross-attention"
        if not hands_down(layer):
            return f"its layer {index} does not hand keyword arguments down to its attention"
    if why := mistaken(module, FlorenzDecoder):
        return why
    return Swap(FlorenzDecoder, ("Layout",))


def _choose_layer(module: Any) -> Swap | str:
    spec = models.read_layer(module)
    if isinstance(spec, str):
        return spec
    theirs, ours = (
        list(inspect.signature(cls.forward).parameters) for cls in (type(module), FlorenzLayer)
    )
    if theirs != ours:
        return "its forward has other arguments than fastvlm.florenz's layer"
    return Swap(FlorenzLayer, ("residual_rms_norm",), (("spec", spec),))


RULES = (Rule(("norm",), has(*models.LAYER.parts), _choose_layer), *t5gemma.RULES)
KNOWN = ("fastvlm.florenz", *gemma2.KNOWN, *t5gemma.KNOWN)
STACKS = (StackRule(_is_stack, _choose_stack, RULES, known=KNOWN),)
