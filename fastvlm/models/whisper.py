"""Whisper: mBART's layers, keys without a bias. Its encoder reads frames of sound, none of them
padding; its decoder is told the positions of its tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fastvlm.models import bart
from fastvlm.models.spec import Embedding, Stack
from fastvlm.models.structure import extra_parts, has, takes
from fastvlm.nn.linear import original

KNOWN = ("transformers.models.whisper.modeling_whisper",)

ENCODER = Stack(
    Embedding(positions="embed_positions"),
    ("attention_mask",),
    norm="layer_norm",
    reads="input_features",
)
DECODER = Stack(
    Embedding(positions="embed_positions", given=True),
    (
        "attention_mask",
        "encoder_hidden_states",
        "past_key_values",
        "inputs_embeds",
        "position_ids",
        "use_cache",
    ),
    ("self_attn", "encoder_attn"),
    norm="layer_norm",
    drops_cache=True,
)
_FRONT = ("conv1", "conv2", "embed_positions")
_TOKENS = ("embed_tokens", "embed_positions")
_ENDS = ("layers", "layer_norm")


def is_stack(module: nn.Module, decodes: bool) -> bool:
    parts = (*(_TOKENS if decodes else _FRONT), *_ENDS)
    if not has(*parts)(module) or not bart.has_layers(module, decodes):
        return False
    if extra_parts(module, *parts):  # encoders that grew from it pool their frames
        return False
    if not decodes:
        return takes(module, ENCODER.reads)
    return takes(module, "position_ids") and not takes(module, "encoder_attention_mask")


def read_stack(module: Any, decodes: bool) -> Stack | str:
    if decodes:
        return DECODER
    known = original(type(module)).__module__ in KNOWN
    return replace(ENCODER, ignores_mask=known)
