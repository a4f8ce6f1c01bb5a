"""BART and its descendants (mBART, the language model of Florence-2): attention, layers, stacks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from fastvlm import ops
from fastvlm.compat import hf
from fastvlm.models import bart as models
from fastvlm.models.spec import Layer
from fastvlm.models.structure import first_layer, has
from fastvlm.nn.linear import is_plain
from fastvlm.nn.mlp import gelu_mlp, is_known_gelu
from fastvlm.nn.wrapped import owns
from fastvlm.patching.attention import cross_attend, heads, self_attend
from fastvlm.patching.layouts import entered, taken
from fastvlm.patching.rules import Host, Rule, StackRule, Swap, choose_stack, mistaken
from fastvlm.patching.stacks import DecoderInputs, DecoderStack, EncoderStack


class BartAttention(Host):
    """Self- or cross-attention; transformers' own forward where no layouts were handed down."""

    @hf.takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        layouts = taken(kwargs, self)
        is_self = key_value_states is None
        if layouts is None or (is_self and not layouts.fuses(attention_mask, hidden_states)):
            return super().forward(
                hidden_states, key_value_states, past_key_values, attention_mask, **kwargs
            )
        dropout_p = self.dropout if self.training else 0.0
        q = heads(self.q_proj(hidden_states), self.head_dim)
        if key_value_states is not None:
            out = cross_attend(
                self,
                q,
                key_value_states,
                layouts,
                past_key_values,
                softcap=None,
                dropout_p=dropout_p,
            )
        else:
            cache = past_key_values
            if isinstance(cache, EncoderDecoderCache):
                cache = cache.self_attention_cache
            out = self_attend(
                q,
                heads(self.k_proj(hidden_states), self.head_dim),
                heads(self.v_proj(hidden_states), self.head_dim),
                layouts,
                cache,
                self.layer_idx,
                mask=attention_mask,
                causal=self.is_causal,
                window=None,
                scale=self.scaling,
                softcap=None,
                dropout_p=dropout_p,
            )
        return self.out_proj(out), None


class _Layer(Host):
    """The MLP and the residual tails that encoder and decoder layers share."""

    spec: Layer
    runs_packed = True

    @property
    def pre_norm(self) -> bool:
        return self.spec.residuals[0].norm is None

    def _enter(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """BART's stack adds positions by column, so it is the first layer that packs."""
        layouts = entered(kwargs, self)
        return hidden_states if layouts is None else layouts.enter(hidden_states)

    def _branch_in(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return norm(x) if self.pre_norm else x

    def _branch_out(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
        p = self.dropout if self.training else 0.0
        if self.pre_norm or not is_plain(norm, nn.LayerNorm) or norm.bias is None:
            x = residual + (F.dropout(x, p) if p > 0 else x)
            return x if self.pre_norm else norm(x)
        return ops.residual_layer_norm(
            x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=p
        )

    def _mlp(self, hidden_states: Tensor) -> Tensor:
        p = self.activation_dropout if self.training else 0.0
        norm = self.final_layer_norm
        x = self._branch_in(hidden_states, norm)
        mlp: Any = self.spec.residuals[-1].branch
        act = None if is_known_gelu(self.activation_fn, mlp.activation) else self.activation_fn
        x = gelu_mlp(x, self.fc1, self.fc2, mlp.approximate, p, act)
        return self._branch_out(x, hidden_states, norm)


class BartEncoderLayer(_Layer):
    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        hidden_states = self._enter(hidden_states, kwargs)
        norm = self.self_attn_layer_norm
        x = self._branch_in(hidden_states, norm)
        x, _ = self.self_attn(x, attention_mask=attention_mask, **kwargs)
        hidden_states = self._mlp(self._branch_out(x, hidden_states, norm))
        if hidden_states.dtype == torch.float16:
            # as transformers does, but decided on the device: no wait for it
            limit = torch.finfo(torch.float16).max - 1000
            finite = torch.isfinite(hidden_states).all()
            hidden_states = torch.where(finite, hidden_states, hidden_states.clamp(-limit, limit))
        return hidden_states


class BartDecoderLayer(_Layer):
    @hf.takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> Tensor:
        hidden_states = self._enter(hidden_states, kwargs)
        norm = self.self_attn_layer_norm
        x, _ = self.self_attn(
            self._branch_in(hidden_states, norm),
            **hf.cached(past_key_values),
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = self._branch_out(x, hidden_states, norm)
        if encoder_hidden_states is not None:
            norm = self.encoder_attn_layer_norm
            x, _ = self.encoder_attn(
                self._branch_in(hidden_states, norm),
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **hf.cached(past_key_values),
                **kwargs,
            )
            hidden_states = self._branch_out(x, hidden_states, norm)
        return self._mlp(hidden_states)


class BartDecoder(DecoderStack):
    has_cross_attention = True
    attentions = ("self_attn", "encoder_attn")
    spec = models.STACK

    def new_cache(self) -> EncoderDecoderCache:
        return EncoderDecoderCache(
            DynamicCache(config=self.config), DynamicCache(config=self.config)
        )

    @hf.takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
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
        return self._run(call, use_cache, kwargs)


def _attention(module: Any) -> Swap | str:
    if why := mistaken(module, BartAttention):
        return why
    spec = models.read_attention(module)
    if isinstance(spec, str):
        return spec
    cached = ("cached_attention",) if module.is_decoder else ()
    cross = module.is_decoder and not module.is_causal
    runs_on = ("cross_attention",) if cross else ("self_attention", *cached)
    return Swap(BartAttention, runs_on, (("spec", spec),))


def _layer(module: Any) -> Swap | str:
    spec = models.read_layer(module)
    if isinstance(spec, str):
        return spec
    mixin = BartDecoderLayer if owns(module, "encoder_attn") else BartEncoderLayer
    if why := mistaken(module, mixin):
        return why
    post_norm = spec.residuals[0].norm is not None
    tail = ("residual_layer_norm",) if post_norm else ()
    return Swap(mixin, ("gelu_mlp", *tail), (("spec", spec),))


RULES = (
    Rule(
        ("attention",),
        has("q_proj", "k_proj", "v_proj", "out_proj", "num_heads", "scaling", "is_causal"),
        _attention,
    ),
    Rule(("mlp", "norm"), has(*models.LAYER), _layer),
)

_STACK = ("layers", "embed_tokens", "embed_positions", "layernorm_embedding")


def _first_layer_has(name: str, wanted: bool) -> Any:
    def test(module: Any) -> bool:
        layer = first_layer(module, "fc1") if has(*_STACK)(module) else None
        return layer is not None and owns(layer, name) == wanted

    return test


_TRANSFORMERS = "transformers.models"
KNOWN = tuple(f"{_TRANSFORMERS}.{name}.modeling_{name}" for name in ("bart", "mbart", "plbart"))

STACKS = (
    StackRule(
        _first_layer_has("encoder_attn", False),
        choose_stack(EncoderStack),
        RULES,
        decodes=False,
        known=KNOWN,
    ),
    StackRule(
        _first_layer_has("encoder_attn", True),
        choose_stack(BartDecoder),
        RULES,
        known=KNOWN,
    ),
)
