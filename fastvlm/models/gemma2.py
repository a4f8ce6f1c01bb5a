"""Gemma-2: attention with RoPE, GQA and softcap, GeGLU, a norm before and after each branch."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvlm.models.spec import Attention, Embedding, Layer, Mlp, Residual, Stack
from fastvlm.models.structure import extra_parts, first_layer, has
from fastvlm.nn.mlp import activation_of, kind_of
from fastvlm.nn.wrapped import owns

KNOWN = ("transformers.models.gemma2.modeling_gemma2",)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ATTENTION = Attention(
    "o_proj",
    ("position_embeddings", "attention_mask", "past_key_values"),
    "attention_dropout",
    rotary=True,
    window="sliding_window",
    softcap="attn_logit_softcapping",
)
MLP = Residual("mlp", "mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm")
SELF = Residual("self", "self_attn", "input_layernorm", "post_attention_layernorm")
POSITIONS = ("position_embeddings", "attention_mask", "position_ids")
LAYER = Layer((SELF, MLP), (*POSITIONS, "past_key_values"), named=True)
MASKS = ("full_attention", "sliding_attention")
STACK = Stack(
    Embedding(),
    ("attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"),
    norm="norm",
    rotary="rotary_emb",
    masks=MASKS,
)
_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")

NORMS = ("q_norm", "k_norm")

is_attention = has(*PROJECTIONS, "num_key_value_groups", "sliding_window")
is_mlp = has(*_MLP)
is_layer = has(*LAYER.parts)
has_stack = has("layers", "norm", "rotary_emb", "embed_tokens")


def read_attention(module: Any) -> Attention | str:
    return extra_parts(module, *PROJECTIONS) or ATTENTION


def read_mlp(module: Any) -> Mlp | str:
    act = activation_of(module.act_fn)
    if act is None:
        return f"its activation {type(module.act_fn).__name__} is none that geglu_mlp has"
    if extra := extra_parts(module, *_MLP, "dropout"):
        return extra
    dropout = "dropout" if owns(module, "dropout") else None
    return Mlp("up_proj", "down_proj", "act_fn", "gate_proj", act, kind_of(module.act_fn), dropout)


def read_layer(module: Any) -> Layer | str:
    return extra_parts(module, *LAYER.parts) or LAYER


def is_stack(module: nn.Module) -> bool:
    layer = first_layer(module, "post_feedforward_layernorm") if has_stack(module) else None
    return layer is not None and not owns(layer, "cross_attn")
