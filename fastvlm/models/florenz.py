"""Florenz: Gemma-2's layers, a gated cross-attention between their branches (arXiv 2503.09443)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fastvlm.models import gemma2, t5gemma
from fastvlm.models.spec import Layer, Residual, Stack
from fastvlm.models.structure import extra_parts, first_layer, hands_down, has
from fastvlm.nn.wrapped import unwrapped

KNOWN = ("fastvlm.florenz", *gemma2.KNOWN, *t5gemma.KNOWN)

_CROSS = Residual(
    "cross",
    "encoder_attn",
    after="post_encoder_attention_layernorm",
    gate="encoder_attn_gate",
    optional=True,
)
LAYER = Layer(
    (gemma2.SELF, _CROSS, gemma2.MLP),
    ("encoder_hidden_states", *gemma2.LAYER.arguments, "encoder_attention_mask"),
)
STACK = replace(
    gemma2.STACK,
    arguments=t5gemma.DECODER.arguments,
    attentions=("self_attn", "encoder_attn"),
)
_LAYER = ("self_attn", "encoder_attn", "encoder_attn_gate", "post_feedforward_layernorm")

is_layer = has(*LAYER.parts)


def read_layer(module: Any) -> Layer | str:
    return extra_parts(module, *LAYER.parts) or LAYER


def is_stack(module: nn.Module) -> bool:
    layer = first_layer(module, "encoder_attn_gate") if gemma2.has_stack(module) else None
    return layer is not None and has(*_LAYER)(layer)


def read_stack(module: Any) -> Stack | str:
    for index, outer in enumerate(module.layers):
        layer = unwrapped(outer, "encoder_attn_gate")
        if layer is None or not has(*_LAYER)(layer):
            return f"its layer {index} has no gated cross-attention"
        cross = unwrapped(layer.encoder_attn, "q_proj")
        if cross is None or not t5gemma.is_cross_attention(cross):
            return f"the encoder_attn of its layer {index} is not like T5Gemma's cross-attention"
        if not hands_down(layer):
            return f"its layer {index} does not hand keyword arguments down to its attention"
    return STACK
