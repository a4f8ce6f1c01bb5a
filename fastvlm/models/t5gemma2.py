"""T5Gemma 2: T5Gemma's layers with Gemma-3's attention; a decoder's reads itself and the encoder's
states in one softmax, with one projection for the keys of both. Images come as rows of the
encoder's text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fastvlm.models import gemma2, gemma3, t5gemma
from fastvlm.models.spec import Attention, Layer, Stack
from fastvlm.models.structure import extra_parts, first_layer, takes
from fastvlm.nn.wrapped import owns, unwrapped

KNOWN = ("transformers.models.t5gemma2.modeling_t5gemma2",)

MERGED_MASK, _STATES = "merged_attention_mask", "encoder_hidden_states"
ATTENTION = replace(gemma3.ATTENTION, splits_window=True)
MERGED_ATTENTION = replace(
    gemma3.ATTENTION,
    arguments=("position_embeddings", MERGED_MASK, _STATES, "past_key_values"),
    states=_STATES,
    causal=None,
    mask=MERGED_MASK,
    merged=True,
)
ENCODER_LAYER = t5gemma.ENCODER_LAYER
DECODER_LAYER = Layer(
    (replace(t5gemma.SELF, reads="merged"), gemma2.MLP),
    ("position_embeddings", MERGED_MASK, "position_ids", "past_key_values", "use_cache", _STATES),
    "dropout",
    hands=("use_cache",),
    named=True,
    splits_cache=False,
    mask=MERGED_MASK,
)
_CHANGED: dict[str, Any] = {"hides_pads": False, "ways": True}
ENCODER = replace(
    t5gemma.ENCODER,
    embedding=gemma2.STACK.embedding,
    on_cpu="its window reaches further behind a row than before it",
    **_CHANGED,
)
DECODER = replace(
    t5gemma.DECODER,
    embedding=gemma2.STACK.embedding,
    attentions=("self_attn",),
    empty_mask=True,
    merged=True,
    on_cpu="its rows read themselves and the encoder's states in one softmax",
    **_CHANGED,
)
_OWN_IMAGES = ("vision_tower", "multi_modal_projector")

is_layer = t5gemma.is_layer


def is_merged_attention(module: nn.Module) -> bool:
    return gemma3.is_attention(module) and takes(module, MERGED_MASK)


def _extra(module: Any) -> str | None:
    return extra_parts(module, *gemma2.PROJECTIONS, *gemma2.NORMS)


def read_attention(module: Any) -> Attention | str:
    return _extra(module) or ATTENTION


def read_merged_attention(module: Any) -> Attention | str:
    return _extra(module) or MERGED_ATTENTION


def read_layer(module: Any) -> Layer | str:
    decodes = takes(module, MERGED_MASK)
    layer = DECODER_LAYER if decodes else ENCODER_LAYER
    return extra_parts(module, *layer.parts, "dropout") or layer


def is_stack(module: nn.Module, decodes: bool) -> bool:
    if not (gemma2.has_stack(module) and owns(module, "dropout")):
        return False
    layer = first_layer(module, "pre_self_attn_layernorm")
    if layer is None or owns(layer, "cross_attn") or not owns(layer, "self_attn"):
        return False
    attention = unwrapped(layer.self_attn, "q_proj")
    known = attention is not None and gemma3.is_attention(attention)
    return known and is_merged_attention(attention) == decodes


def read_stack(module: nn.Module, decodes: bool) -> Stack | str:
    if any(owns(module, name) for name in _OWN_IMAGES):
        return "it places the images among its tokens itself, as in transformers 5.0"
    return DECODER if decodes else ENCODER
