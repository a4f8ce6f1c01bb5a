"""Florenz: Gemma-2's layers, a gated cross-attention between their branches (arXiv 2503.09443)."""

from __future__ import annotations

from typing import Any

from fastvlm.models import gemma2
from fastvlm.models.spec import Layer, Residual
from fastvlm.models.structure import extra_parts

STACK = gemma2.STACK
_SELF, _MLP = gemma2.LAYER.residuals
_CROSS = Residual(
    "cross",
    "encoder_attn",
    after="post_encoder_attention_layernorm",
    gate="encoder_attn_gate",
    optional=True,
)
LAYER = Layer((_SELF, _CROSS, _MLP))


def read_layer(module: Any) -> Layer | str:
    return extra_parts(module, *LAYER.parts) or LAYER
