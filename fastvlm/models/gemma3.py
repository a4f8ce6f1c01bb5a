"""Gemma-3's decoder: Gemma-2's layers, with norms of the heads of queries and keys in place of caps
on the scores, and a rotary base for each of its two kinds of layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fastvlm.models import gemma2
from fastvlm.models.spec import Attention, Stack
from fastvlm.models.structure import extra_parts, first_layer, has
from fastvlm.nn.wrapped import owns

KNOWN = ("transformers.models.gemma3.modeling_gemma3",)

# a cap that its config may name is left out by transformers, whatever the implementation
ATTENTION = replace(
    gemma2.ATTENTION, softcap=None, causal="is_causal", norms=gemma2.NORMS, way="layer_type"
)
_STACK = replace(gemma2.STACK, ways=True)

is_attention = has(
    *gemma2.PROJECTIONS, *gemma2.NORMS, "num_key_value_groups", "sliding_window", "layer_type"
)


def read_attention(module: Any) -> Attention | str:
    if extra := extra_parts(module, *gemma2.PROJECTIONS, *gemma2.NORMS):
        return extra
    if not module.is_causal:
        return "its rows see those behind them too (use_bidirectional_attention)"
    return ATTENTION


def is_stack(module: nn.Module) -> bool:
    if not gemma2.is_stack(module):
        return False
    layer = first_layer(module, "post_feedforward_layernorm")
    return owns(layer, "self_attn") and is_attention(layer.self_attn)


def read_stack(module: nn.Module) -> Stack | str:
    return _STACK
