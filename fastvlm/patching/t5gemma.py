"""T5Gemma: an encoder and a decoder of Gemma-2 layers, with cross-attention in the decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from fastvlm.compat import hf
from fastvlm.models import t5gemma as models
from fastvlm.models.structure import first_layer, has, takes
from fastvlm.nn.wrapped import owns
from fastvlm.patching import gemma2
from fastvlm.patching.attention import cross_attend, heads
from fastvlm.patching.layouts import entered, taken
from fastvlm.patching.rules import Host, Rule, StackRule, Swap, choose_stack, mistaken
from fastvlm.patching.stacks import DecoderInputs, EncoderStack
from fastvlm.run.attention import softcap_of


class T5GemmaCrossAttention(Host):
    """Cross-attention; transformers' own forward where no layouts were handed down."""

    @hf.takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        layouts = taken(kwargs, self)
        if layouts is None or encoder_hidden_states is None:
            return super().forward(
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                **hf.cached(past_key_values),
                **kwargs,
            )
        out = cross_attend(
            self,
            heads(self.q_proj(hidden_states), self.head_dim),
            encoder_hidden_states,
            layouts,
            past_key_values,
            softcap=softcap_of(self, self.spec),
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return self.o_proj(out), None


class T5GemmaEncoderLayer(gemma2.SandwichLayer):
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        entered(kwargs, self)
        x, _ = self.self_attn(
            hidden_states=self.pre_self_attn_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **hf.cached(None),
            **kwargs,
        )
        norms = self.post_self_attn_layernorm, self.pre_feedforward_layernorm
        h, x = self._tail(x, hidden_states, *norms)
        return self._mlp(x, h)


class T5GemmaDecoderLayer(gemma2.SandwichLayer):
    @hf.takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        entered(kwargs, self)
        own = past_key_values.self_attention_cache if past_key_values is not None else None
        x, _ = self.self_attn(
            hidden_states=self.pre_self_attn_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **hf.cached(own),
            use_cache=use_cache,
            **kwargs,
        )
        norms = self.post_self_attn_layernorm, self.pre_cross_attn_layernorm
        h, x = self._tail(x, hidden_states, *norms)
        x, _ = self.cross_attn(
            hidden_states=x,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            **hf.cached(past_key_values),
            use_cache=use_cache,
            **kwargs,
        )
        norms = self.post_cross_attn_layernorm, self.pre_feedforward_layernorm
        h, x = self._tail(x, h, *norms)
        return self._mlp(x, h)


class _DefaultMask:
    """The stacks of T5Gemma take pad tokens for padding when they are given no mask."""

    packs_ids = True

    def default_mask(self, input_ids: Tensor | None) -> Tensor | None:
        pad = self.config.pad_token_id  # type: ignore[attr-defined]
        return None if input_ids is None or pad is None else input_ids != pad

    def no_mask(self) -> Any:
        return dict(gemma2.MASKLESS)


class T5GemmaEncoder(_DefaultMask, EncoderStack):
    pass


class T5GemmaDecoder(_DefaultMask, gemma2.GemmaSteps):
    has_cross_attention = True
    attentions = ("self_attn", "cross_attn")
    spec = models.STACK

    def no_cross_mask(self) -> Any:
        return {"full_attention": None}

    def new_cache(self) -> EncoderDecoderCache:
        return EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache())

    def _wants_cache(self, use_cache: bool | None) -> bool:
        return not self.training and super()._wants_cache(use_cache)

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


def _choose_cross(module: Any) -> Swap | str:
    if why := mistaken(module, T5GemmaCrossAttention):
        return why
    spec = models.read_cross_attention(module)
    if isinstance(spec, str):
        return spec
    return Swap(T5GemmaCrossAttention, ("cross_attention",), (("spec", spec),))


def _choose_layer(module: Any) -> Swap | str:
    mixin = T5GemmaDecoderLayer if owns(module, "cross_attn") else T5GemmaEncoderLayer
    return gemma2.layer_swap(module, mixin, models.read_layer(module))


def _is_cross(module: Any) -> bool:
    projections = has("q_proj", "k_proj", "v_proj", "o_proj", "num_key_value_groups")(module)
    return projections and takes(module, "encoder_hidden_states")


RULES = (
    Rule(("attention",), _is_cross, _choose_cross),
    Rule(("norm",), has("dropout", *models.ENCODER_LAYER.parts), _choose_layer),
    *gemma2.RULES,
)


def _stack(decoder: bool) -> Any:
    def test(module: Any) -> bool:
        named = has("layers", "norm", "rotary_emb", "embed_tokens", "dropout")(module)
        layer = first_layer(module, "pre_self_attn_layernorm") if named else None
        return layer is not None and owns(layer, "cross_attn") == decoder

    return test


KNOWN = ("transformers.models.t5gemma.modeling_t5gemma",)
STACKS = (
    StackRule(_stack(False), choose_stack(T5GemmaEncoder), RULES, decodes=False, known=KNOWN),
    StackRule(_stack(True), choose_stack(T5GemmaDecoder), RULES, known=KNOWN),
)
