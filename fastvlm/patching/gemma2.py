"""Gemma-2 (and Gemma): attention with RoPE, GQA and softcap; GeGLU; RMSNorm; the decoder stack."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from fastvlm import ops
from fastvlm.compat import hf
from fastvlm.models import gemma2 as models
from fastvlm.models.spec import Layer
from fastvlm.models.structure import first_layer, has
from fastvlm.nn.linear import is_watched
from fastvlm.nn.mlp import GegluMLP
from fastvlm.nn.norm import RMSNorm, is_plain_rms_norm
from fastvlm.nn.wrapped import owns
from fastvlm.patching.attention import heads, self_attend
from fastvlm.patching.layouts import entered, taken
from fastvlm.patching.rules import Host, Rule, StackRule, Swap, choose_stack, mistaken
from fastvlm.patching.stacks import DecoderInputs, DecoderStack
from fastvlm.run.attention import softcap_of, window_of

MASKLESS = {"full_attention": None, "sliding_attention": None}


class GemmaAttention(Host):
    """Self-attention; transformers' own forward where no layouts were handed down."""

    @hf.takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        layouts = taken(kwargs, self)
        if layouts is None or not layouts.fuses(attention_mask, hidden_states):
            return super().forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **hf.cached(past_key_values),
                **kwargs,
            )
        batch, length = hidden_states.shape[:2]
        cos, sin = (t.expand(batch, -1, -1).flatten(0, 1) for t in position_embeddings)
        q, k = ops.rope(
            heads(self.q_proj(hidden_states), self.head_dim).flatten(0, 1),
            heads(self.k_proj(hidden_states), self.head_dim).flatten(0, 1),
            cos,
            sin,
        )
        out = self_attend(
            q.unflatten(0, (batch, length)),
            k.unflatten(0, (batch, length)),
            heads(self.v_proj(hidden_states), self.head_dim),
            layouts,
            past_key_values,
            self.layer_idx,
            mask=attention_mask,
            causal=self.is_causal,
            window=window_of(self, self.spec),
            scale=self.scaling,
            softcap=softcap_of(self, self.spec),
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return self.o_proj(out), None


class VarianceEpsilonRMSNorm(RMSNorm):
    """For the modules that call their eps so."""

    @property
    def eps(self) -> float:  # type: ignore[override]
        return float(self.__dict__["variance_epsilon"])


class GemmaSteps(DecoderStack):
    """Gemma-2's stack and those that grew from it."""

    packs_ids = True
    spec = models.STACK


class GemmaDecoder(GemmaSteps):
    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.config)

    def no_mask(self) -> Any:
        return dict(MASKLESS)

    @hf.takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        call = DecoderInputs(input_ids, attention_mask, past_key_values, inputs_embeds, None, None)
        return self._run(call, use_cache, {"position_ids": position_ids, **kwargs})


class SandwichLayer(Host):
    """A layer whose branches have a norm before and one after (Gemma-2).

    The norm after a branch, the residual and the norm before the next one are one op.
    """

    def _tail(
        self, x: Tensor, residual: Tensor, post: Any, following: Any = None, gate: Any = None
    ) -> Any:
        """h = residual + [tanh(gate)] post(x), and where a norm follows also following(h)."""
        dropout = getattr(self, "dropout", None)
        drops = dropout is not None and (is_watched(dropout) or (self.training and dropout.p > 0))
        norms = [post] if following is None else [post, following]
        alike = {(norm.eps, norm.offset) for norm in norms if is_plain_rms_norm(norm)}
        if not drops and len(alike) == 1 and all(map(is_plain_rms_norm, norms)):
            return ops.residual_rms_norm(
                x,
                residual,
                post.weight,
                gate=gate,
                next_weight=None if following is None else following.weight,
                eps=post.eps,
                offset=post.offset,
            )
        x = post(x) if gate is None else torch.tanh(gate) * post(x)
        h = residual + (self.dropout(x) if drops else x)
        return h if following is None else (h, following(h))

    def _mlp(self, x: Tensor, residual: Tensor) -> Tensor:
        h: Tensor = self._tail(self.mlp(x), residual, self.post_feedforward_layernorm)
        return h


class GemmaLayer(SandwichLayer):
    @hf.takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        entered(kwargs, self)
        x, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **hf.cached(past_key_values),
            **kwargs,
        )
        norms = self.post_attention_layernorm, self.pre_feedforward_layernorm
        h, x = self._tail(x, hidden_states, *norms)
        return self._mlp(x, h)


def choose_attention(module: Any) -> Swap | str:
    if why := mistaken(module, GemmaAttention):
        return why
    spec = models.read_attention(module)
    if isinstance(spec, str):
        return spec
    cached = ("cached_attention",) if module.is_causal else ()
    return Swap(GemmaAttention, ("rope", "self_attention", *cached), (("spec", spec),))


def choose_mlp(module: Any) -> Swap | str:
    spec = models.read_mlp(module)
    if isinstance(spec, str):
        return spec
    attributes = ("approximate", spec.approximate), ("activation", spec.activation), ("spec", spec)
    return Swap(GegluMLP, ("geglu_mlp",), attributes)


def choose_norm(module: Any) -> Swap | str:
    """(1 + w) or w: told apart by running it once, with numbers in place of its weight."""
    named_eps = hasattr(module, "eps")
    eps = module.eps if named_eps else module.variance_epsilon
    weight = torch.linspace(-0.5, 0.75, module.weight.numel())
    with torch.no_grad():
        x = torch.linspace(-1, 2, weight.numel()).unsqueeze(0)
        y = _with_weight(module, weight)(x).float()
        for offset in (1.0, 0.0):
            ours = ops.rms_norm(x, weight, eps=eps, offset=offset).float()
            if torch.allclose(y, ours, rtol=1e-2, atol=1e-3):
                mixin = RMSNorm if named_eps else VarianceEpsilonRMSNorm
                return Swap(mixin, ("rms_norm",), (("offset", offset),))
    return "it computes neither (1 + w) nor w times x / rms(x)"


def _with_weight(module: Any, weight: Tensor) -> Any:
    """What the class of module computes with another weight: no hook, no offloader is called."""
    twin = object.__new__(type(module))
    twin.__dict__.update(vars(module), _parameters={"weight": nn.Parameter(weight)})
    return functools.partial(type(module).forward, twin)


def _choose_layer(module: Any) -> Swap | str:
    return layer_swap(module, GemmaLayer, models.read_layer(module))


def layer_swap(module: Any, mixin: Any, spec: Layer | str) -> Swap | str:
    if isinstance(spec, str):
        return spec
    return mistaken(module, mixin) or Swap(mixin, ("residual_rms_norm",), (("spec", spec),))


def is_rms_norm(module: Any) -> bool:
    named = hf.is_named(module, "RMSNorm")
    has_eps = owns(module, "eps") or owns(module, "variance_epsilon")
    return named and has_eps and isinstance(module._parameters.get("weight"), Tensor)


RULES = (
    Rule(
        ("attention",),
        has("q_proj", "k_proj", "v_proj", "o_proj", "num_key_value_groups", "sliding_window"),
        choose_attention,
    ),
    Rule(("mlp",), has("gate_proj", "up_proj", "down_proj", "act_fn"), choose_mlp),
    Rule(("norm",), is_rms_norm, choose_norm),
    Rule(("norm",), has(*models.LAYER.parts), _choose_layer),
)


def _is_stack(module: Any) -> bool:
    if not has("layers", "norm", "rotary_emb", "embed_tokens")(module):
        return False
    layer = first_layer(module, "post_feedforward_layernorm")
    return layer is not None and not owns(layer, "cross_attn")


KNOWN = ("transformers.models.gemma2.modeling_gemma2",)
STACKS = (StackRule(_is_stack, choose_stack(GemmaDecoder), RULES, known=KNOWN),)
