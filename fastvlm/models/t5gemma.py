"""T5Gemma: an encoder and a decoder of Gemma-2's layers, with cross-attention in the decoder."""

from __future__ import annotations

from typing import Any

from fastvlm.models import gemma2
from fastvlm.models.spec import Attention, Embedding, Layer, Residual, Stack
from fastvlm.models.structure import extra_parts
from fastvlm.nn.wrapped import owns

CROSS_ATTENTION = Attention(
    "o_proj", states="encoder_hidden_states", softcap="attn_logit_softcapping"
)
STACK = Stack(Embedding(scaled=True), norm="norm", rotary="rotary_emb")
_SELF = Residual("self", "self_attn", "pre_self_attn_layernorm", "post_self_attn_layernorm")
_CROSS = Residual("cross", "cross_attn", "pre_cross_attn_layernorm", "post_cross_attn_layernorm")
ENCODER_LAYER = Layer((_SELF, gemma2.MLP), "dropout")
DECODER_LAYER = Layer((_SELF, _CROSS, gemma2.MLP), "dropout")


def read_cross_attention(module: Any) -> Attention | str:
    return extra_parts(module, *gemma2.PROJECTIONS) or CROSS_ATTENTION


def read_layer(module: Any) -> Layer | str:
    layer = DECODER_LAYER if owns(module, "cross_attn") else ENCODER_LAYER
    return extra_parts(module, *layer.parts, "dropout") or layer
