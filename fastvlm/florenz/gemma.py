"""Gemma-2's decoder with a gated cross-attention in every layer (arXiv 2503.09443, section 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model
from transformers import initialization as init
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2Attention,
    Gemma2DecoderLayer,
    Gemma2PreTrainedModel,
    Gemma2RMSNorm,
    Gemma2RotaryEmbedding,
    Gemma2TextScaledWordEmbedding,
)
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaCrossAttention

from fastvlm.compat import hf
from fastvlm.compat.modeling import OutputRecorder, merge_with_config_defaults


class FlorenzGemmaLayer(Gemma2DecoderLayer):
    """h + RMS(SelfAttn(RMS(h))); h + tanh(gate) * RMS(CrossAttn(h)); h + RMS(MLP(RMS(h))).

    The cross-attention reads h as it is, without a norm before it; it has the heads, the scale and
    the softcap of the self-attention, keys and values of the encoder's width, no RoPE. Its gate
    starts at 0: the layer is then Gemma's own.
    """

    def __init__(self, config: Gemma2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.encoder_attn = T5GemmaCrossAttention(config, layer_idx)
        self.encoder_attn_gate = nn.Parameter(torch.zeros(1))
        self.post_encoder_attention_layernorm = Gemma2RMSNorm(
            config.hidden_size, eps=config.rms_norm_eps
        )

    def __call__(
        self, hidden_states: Tensor, *, encoder_hidden_states: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        # reentrant checkpointing gives gradients to positional arguments only
        output: Tensor = super().__call__(hidden_states, encoder_hidden_states, **kwargs)
        return output

    @hf.takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """h [S, L, d] and the encoder's states [S, E, d_e] -> [S, L, d]; masks are 4-D or None."""
        own = past_key_values
        if isinstance(own, EncoderDecoderCache):
            own = own.self_attention_cache
        h = hidden_states
        branch, _ = self.self_attn(
            self.input_layernorm(h),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **hf.cached(own),
            **kwargs,
        )
        h = h + self.post_attention_layernorm(branch)
        if encoder_hidden_states is not None:
            branch, _ = self.encoder_attn(
                h,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                **hf.cached(past_key_values),
                **kwargs,
            )
            gate = torch.tanh(self.encoder_attn_gate)
            h = h + gate * self.post_encoder_attention_layernorm(branch)
        branch = self.mlp(self.pre_feedforward_layernorm(h))
        return h + self.post_feedforward_layernorm(branch)


class FlorenzGemmaDecoder(Gemma2Model):
    """Gemma-2's stack of FlorenzGemmaLayer.

    config: a Gemma2Config with cross_attention_hidden_size, the width of the encoder.
    """

    _no_split_modules = ["FlorenzGemmaLayer"]  # noqa: RUF012 (transformers changes it per instance)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": FlorenzGemmaLayer,
        "attentions": OutputRecorder(Gemma2Attention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(
            T5GemmaCrossAttention, index=1, layer_name="encoder_attn"
        ),
    }

    _supports_sdpa = False  # it knows no softcap, and Gemma-2 to transformers 5.22 would choose it

    def __init__(self, config: Gemma2Config):
        # not Gemma2Model's: it would make, and throw away, a second set of layers
        Gemma2PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = Gemma2TextScaledWordEmbedding(
            config.vocab_size,
            config.hidden_size,
            self.padding_idx,
            embed_scale=config.hidden_size**0.5,
        )
        self.layers = nn.ModuleList(
            FlorenzGemmaLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Gemma2RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlorenzGemmaLayer):
            init.zeros_(module.encoder_attn_gate)

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """ "sdpa" asked of the whole model means eager here: sdpa knows no softcap."""
        if requested_attention == "sdpa":
            requested_attention = None
        chosen: str = super().get_correct_attn_implementation(requested_attention, is_init_check)
        return chosen

    @merge_with_config_defaults
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
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The arguments of Gemma2Model, with the states [S, E, d_e] and the mask [S, E] to read.

        Without encoder_hidden_states it is Gemma-2. Embeddings of input_ids are scaled by
        sqrt(hidden), inputs_embeds are taken as they are. Returns
        BaseModelOutputWithPastAndCrossAttentions; the cache is an EncoderDecoderCache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "fastvlm.florenz: exactly one of decoder_input_ids and decoder_inputs_embeds must "
                f"be given; got {'neither' if input_ids is None else 'both'}"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            # no sliding window in the cross cache: every key of an image stays
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache())
        own = past_key_values
        if isinstance(own, EncoderDecoderCache):
            own = own.self_attention_cache
        if not isinstance(attention_mask, dict):
            arguments = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                **hf.cached(own),
                "position_ids": position_ids,
            }
            attention_mask = {
                "full_attention": create_causal_mask(**arguments),
                "sliding_attention": create_sliding_window_causal_mask(**arguments),
            }
        if encoder_hidden_states is not None:
            kwargs["encoder_hidden_states"] = encoder_hidden_states
            kwargs["encoder_attention_mask"] = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        return_dict = kwargs.pop("return_dict", True)
        output = super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            **hf.cached(past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        output = BaseModelOutputWithPastAndCrossAttentions(**output)
        return output if return_dict is not False else output.to_tuple()
