"""TrOCR's decoder: BART's layers, handed no arguments that their stack does not know."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fastvlm.models import bart
from fastvlm.models.spec import Attention, Embedding, Layer, Stack
from fastvlm.models.structure import extra_parts, first_layer, has
from fastvlm.nn.wrapped import owns, unwrapped

KNOWN = ("transformers.models.trocr.modeling_trocr",)

# what reaches its layers: whether they fill a cache, which they do by the cache alone
_HANDS = "use_cache"
_PARTS = ("layers", "embed_tokens", "embed_positions")
_NORM = "layernorm_embedding"

_parts = has(*_PARTS)
_is_attention = has("q_proj", "k_proj", "v_proj", "out_proj", "num_heads", "scaling", "kdim")


def is_attention(module: Any) -> bool:
    return _is_attention(module) and not owns(module, "is_causal")


def read_attention(module: Any) -> Attention | str:
    found = bart.read_attention(module)
    return found if isinstance(found, str) else replace(found, causal=None)


def read_layer(module: Any) -> Layer | str:
    found = bart.read_layer(module)
    if isinstance(found, str):
        return found
    arguments = (*found.arguments[:-1], "output_attentions", _HANDS)
    return replace(found, arguments=arguments, handed=_HANDS, in_tuple=True)


def is_stack(module: Any) -> bool:
    if not _parts(module) or not bart.has_layers(module, decodes=True):
        return False
    attention = first_layer(module, "fc1")._modules.get("self_attn")
    attention = None if attention is None else unwrapped(attention, "q_proj")
    return attention is not None and is_attention(attention)


def read_stack(module: Any) -> Stack | str:
    if extra := extra_parts(module, *_PARTS, _NORM):
        return extra
    embedding = Embedding(
        positions="embed_positions",
        # waves, which a pad token has none of; otherwise a table
        counts_tokens=not isinstance(module.embed_positions, nn.Embedding),
        norm=_NORM if module._modules.get(_NORM) is not None else None,
    )
    return replace(bart.DECODER, embedding=embedding, hands=_HANDS)
