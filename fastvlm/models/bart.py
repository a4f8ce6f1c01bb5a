"""BART and its descendants: mBART, the language model of Florence-2."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvlm.compat import hf
from fastvlm.models.spec import Attention, Embedding, Layer, Mlp, Residual, Stack
from fastvlm.models.structure import extra_parts
from fastvlm.nn.mlp import gelu_kind, kind_of
from fastvlm.nn.wrapped import owns

ATTENTION = Attention("out_proj", states="key_value_states")
STACK = Stack(Embedding(positions="embed_positions", norm="layernorm_embedding"))

LAYER = ("self_attn", "fc1", "fc2", "activation_fn", "self_attn_layer_norm", "final_layer_norm")


def read_attention(module: Any) -> Attention | str:
    return extra_parts(module, "q_proj", "k_proj", "v_proj", "out_proj") or ATTENTION


def _is_pre_norm(layer: Any) -> bool | None:
    """Whether the layer normalizes before its branches; None where nothing tells."""
    explicit = getattr(layer, "normalize_before", None)
    if explicit is not None:
        return bool(explicit)
    if hf.is_named(layer, "MBart"):
        return True
    return False if hf.is_named(layer, "Bart") or hf.is_named(layer, "Florence2") else None


def read_layer(module: Any) -> Layer | str:
    kind = gelu_kind(module.activation_fn)
    if kind is None:
        return f"its activation {type(module.activation_fn).__name__} is not GELU"
    if extra := extra_parts(module, *LAYER, "encoder_attn", "encoder_attn_layer_norm"):
        return extra
    pre_norm = _is_pre_norm(module)
    if pre_norm is None:
        return f"{type(module).__name__} does not tell whether it normalizes before or after"
    norms = [m for m in module.children() if isinstance(m, nn.LayerNorm)]
    if any(not norm.elementwise_affine or norm.bias is None for norm in norms):
        return "a LayerNorm without weight and bias"
    act, dropout = kind_of(module.activation_fn), "activation_dropout"
    mlp = Mlp("fc1", "fc2", "activation_fn", None, kind, act, dropout)

    def residual(reads: str, branch: str | Mlp, norm: str, optional: bool = False) -> Residual:
        where = {"before" if pre_norm else "norm": norm}
        return Residual(reads, branch, optional=optional, **where)

    own = residual("self", "self_attn", "self_attn_layer_norm")
    last = residual("mlp", mlp, "final_layer_norm")
    if not owns(module, "encoder_attn"):
        return Layer((own, last), "dropout")
    cross = residual("cross", "encoder_attn", "encoder_attn_layer_norm", optional=True)
    return Layer((own, cross, last), "dropout")
