"""BLIP's text model as the decoder of captions and answers: BERT's layers, which hand nothing on.

A call says by `is_decoder` whether rows see only those before them; the mask of the picture's
states reaches no attention (transformers 5.5 to 5.24), so none of them is left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fastvlm.models import bert
from fastvlm.models.spec import Attention, Layer, Stack
from fastvlm.models.structure import extra_parts, takes
from fastvlm.nn.wrapped import owns

KNOWN = ("transformers.models.blip.modeling_blip_text",)

_STATES = ("encoder_hidden_states", "encoder_attention_mask")
_MASKS = ("attention_mask", "encoder_attention_mask")


def is_attention(module: Any) -> bool:
    return bert.is_attention(module) and not owns(module, "is_causal")


def read_attention(module: Any) -> Attention | str:
    if extra := extra_parts(module, "query", "key", "value", "dropout"):
        return extra
    return replace(
        bert.ROWS,
        arguments=("attention_mask", *_STATES, "past_key_values"),
        scale="scaling" if owns(module, "scaling") else None,
        states="encoder_hidden_states",
        causal=None,
    )


def read_layer(module: Any) -> Layer | str:
    return bert.read_layer(module, ("encoder_hidden_states", *_MASKS, "past_key_values"))


def is_stack(module: Any) -> bool:
    return bert.first_layer(module) is not None and takes(module, "is_decoder")


def read_stack(module: Any) -> Stack | str:
    found = bert.read_stack(module)
    if isinstance(found, str):
        return found
    return replace(
        found, causal="is_decoder", by_layers=True, ignores_cross_mask=True, wraps_cache=True
    )


def encoders(model: nn.Module) -> set[nn.Module]:
    """Text models outside of any with a head over tokens: nobody calls them as decoders."""
    decode: set[nn.Module] = set()
    for owner in model.modules():
        if getattr(owner, "get_output_embeddings", lambda: None)() is not None:
            decode |= set(owner.modules())
    return {m for m in model.modules() if is_stack(m)} - decode
