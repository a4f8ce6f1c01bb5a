"""Gemma-2: attention with RoPE, GQA and softcap, GeGLU, a norm before and after each branch."""

from __future__ import annotations

from typing import Any

from fastvlm.models.spec import Attention, Embedding, Layer, Mlp, Residual, Stack
from fastvlm.models.structure import extra_parts
from fastvlm.nn.mlp import gelu_kind, kind_of
from fastvlm.nn.wrapped import owns

_MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ATTENTION = Attention(
    "o_proj", rotary=True, window="sliding_window", softcap="attn_logit_softcapping"
)
STACK = Stack(Embedding(), norm="norm", rotary="rotary_emb")
MLP = Residual("mlp", "mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm")
LAYER = Layer((Residual("self", "self_attn", "input_layernorm", "post_attention_layernorm"), MLP))


def read_attention(module: Any) -> Attention | str:
    return extra_parts(module, *PROJECTIONS) or ATTENTION


def read_mlp(module: Any) -> Mlp | str:
    kind = gelu_kind(module.act_fn)
    if kind is None:
        return f"its activation {type(module.act_fn).__name__} is not GELU"
    if extra := extra_parts(module, *_MLP, "act_fn", "dropout"):
        return extra
    dropout = "dropout" if owns(module, "dropout") else None
    return Mlp("up_proj", "down_proj", "act_fn", "gate_proj", kind, kind_of(module.act_fn), dropout)


def read_layer(module: Any) -> Layer | str:
    return extra_parts(module, *LAYER.parts) or LAYER
