"""T5Gemma: an encoder and a decoder of Gemma-2's layers, with cross-attention in the decoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvlm.models import gemma2
from fastvlm.models.spec import Attention, Embedding, Layer, Residual, Stack
from fastvlm.models.structure import extra_parts, first_layer, has, takes
from fastvlm.nn.wrapped import owns

KNOWN = ("transformers.models.t5gemma.modeling_t5gemma",)

CROSS_ATTENTION = Attention(
    "o_proj",
    ("attention_mask", "encoder_hidden_states", "past_key_values"),
    "attention_dropout",
    states="encoder_hidden_states",
    cross=True,
    softcap="attn_logit_softcapping",
)
SELF = Residual("self", "self_attn", "pre_self_attn_layernorm", "post_self_attn_layernorm")
_CROSS = Residual("cross", "cross_attn", "pre_cross_attn_layernorm", "post_cross_attn_layernorm")
_STATES = ("encoder_hidden_states", "encoder_attention_mask")
ENCODER_LAYER = Layer((SELF, gemma2.MLP), gemma2.POSITIONS, "dropout", named=True)
DECODER_LAYER = Layer(
    (SELF, _CROSS, gemma2.MLP),
    (*gemma2.POSITIONS, "past_key_values", "use_cache", *_STATES),
    "dropout",
    hands=("use_cache",),
    named=True,
)
_STACK: dict[str, Any] = {
    "norm": "norm",
    "rotary": "rotary_emb",
    "hides_pads": True,
    "masks": gemma2.MASKS,
}
ENCODER = Stack(Embedding(scaled=True), ("attention_mask",), **_STACK)
DECODER = Stack(
    Embedding(scaled=True),
    (*gemma2.STACK.arguments, *_STATES),
    ("self_attn", "cross_attn"),
    cross_masks=("full_attention",),
    trains_cached=False,
    **_STACK,
)

is_layer = has("dropout", *ENCODER_LAYER.parts)
_has_projections = has(*gemma2.PROJECTIONS, "num_key_value_groups")


def is_cross_attention(module: nn.Module) -> bool:
    return _has_projections(module) and takes(module, "encoder_hidden_states")


def read_cross_attention(module: Any) -> Attention | str:
    return extra_parts(module, *gemma2.PROJECTIONS) or CROSS_ATTENTION


def read_layer(module: Any) -> Layer | str:
    layer = DECODER_LAYER if owns(module, "cross_attn") else ENCODER_LAYER
    return extra_parts(module, *layer.parts, "dropout") or layer


def is_stack(module: nn.Module, decodes: bool) -> bool:
    if not (gemma2.has_stack(module) and owns(module, "dropout")):
        return False
    layer = first_layer(module, "pre_self_attn_layernorm")
    return layer is not None and owns(layer, "cross_attn") == decodes


def read_stack(module: nn.Module, decodes: bool) -> Stack | str:
    return DECODER if decodes else ENCODER
