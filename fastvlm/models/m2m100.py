"""M2M100 and NLLB: mBART's layers; positions are waves, counted in the tokens that are no pads."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvlm.compat import hf
from fastvlm.models import bart
from fastvlm.models.spec import Embedding, Stack
from fastvlm.models.structure import has, takes

KNOWN = ("transformers.models.m2m_100.modeling_m2m_100",)

_EMBEDDING = Embedding(positions="embed_positions", counts_tokens=True)
ENCODER = Stack(_EMBEDDING, ("attention_mask",), norm="layer_norm")
DECODER = Stack(
    _EMBEDDING,
    bart.DECODER.arguments,
    bart.DECODER.attentions,
    norm="layer_norm",
)

_parts = has("layers", "embed_tokens", "embed_positions", "layer_norm")


def is_stack(module: Any, decodes: bool) -> bool:
    if not _parts(module) or not bart.has_layers(module, decodes):
        return False
    return takes(module.embed_positions, "input_ids", "inputs_embeds", hf.length_argument())


def read_stack(module: nn.Module, decodes: bool) -> Stack | str:
    return DECODER if decodes else ENCODER
