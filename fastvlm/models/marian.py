"""Marian, Pegasus, Blenderbot, BlenderbotSmall: BART's or mBART's layers; positions, waves or
learned, begin with the first row of their table."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvlm.models import bart
from fastvlm.models.spec import Embedding, Stack
from fastvlm.models.structure import extra_parts, has, takes
from fastvlm.nn.wrapped import owns

KNOWN = tuple(
    f"transformers.models.{name}.modeling_{name}"
    for name in ("marian", "pegasus", "blenderbot", "blenderbot_small")
)
_PARTS = ("layers", "embed_tokens", "embed_positions")
_NORMS = ("layernorm_embedding", "layer_norm")

_parts = has(*_PARTS)


def is_stack(module: Any, decodes: bool) -> bool:
    if not _parts(module) or not bart.has_layers(module, decodes):
        return False
    positions = module.embed_positions
    return isinstance(positions, nn.Embedding) and takes(positions, "input_ids_shape")


def read_stack(module: Any, decodes: bool) -> Stack | str:
    if extra := extra_parts(module, *_PARTS, *_NORMS):
        return extra
    norms = owns(module, "layernorm_embedding")
    # a decoder that normalizes what it looked up does not scale it, though it has the number
    scales = hasattr(module, "embed_scale") and not (norms and decodes)
    embedding = Embedding(
        factor="embed_scale" if scales else None,
        positions="embed_positions",
        offset=None,
        norm="layernorm_embedding" if norms else None,
        norm_first=decodes,
    )
    norm = "layer_norm" if owns(module, "layer_norm") else None
    if decodes:
        return Stack(embedding, bart.DECODER.arguments, bart.DECODER.attentions, norm=norm)
    return Stack(embedding, bart.ENCODER.arguments, norm=norm)
