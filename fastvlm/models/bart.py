"""BART and its descendants: mBART, the language model of Florence-2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fastvlm.compat import hf
from fastvlm.models.spec import Attention, Embedding, Layer, Mlp, Residual, Stack
from fastvlm.models.structure import extra_parts, first_layer, has
from fastvlm.nn.mlp import activation_of, kind_of
from fastvlm.nn.wrapped import owns

KNOWN = tuple(f"transformers.models.{n}.modeling_{n}" for n in ("bart", "mbart", "plbart"))

ATTENTION = Attention(
    "out_proj",
    ("key_value_states", "past_key_values", "attention_mask"),
    "dropout",
    states="key_value_states",
)
_EMBEDDING = Embedding(positions="embed_positions", norm="layernorm_embedding")
_STATES = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values")
ENCODER = Stack(_EMBEDDING, ("attention_mask",))
DECODER = Stack(
    _EMBEDDING,
    ("attention_mask", *_STATES, "inputs_embeds", "use_cache"),
    ("self_attn", "encoder_attn"),
)
LAYER = ("self_attn", "fc1", "fc2", "activation_fn", "self_attn_layer_norm", "final_layer_norm")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

# whether layers of this name normalize before their branches; the first that fits a class
_PRE_NORM = {
    "MBart": True,
    "Whisper": True,
    "M2M100": True,
    "Pegasus": True,
    "BlenderbotSmall": False,
    "Blenderbot": True,
    "Marian": False,
    "TrOCR": False,
    "Bart": False,
    "Florence2": False,
}

is_attention = has(*_PROJECTIONS, "num_heads", "scaling", "is_causal")
is_layer = has(*LAYER)


def read_attention(module: Any) -> Attention | str:
    return extra_parts(module, *_PROJECTIONS) or ATTENTION


def _is_pre_norm(layer: Any) -> bool | None:
    """Whether the layer normalizes before its branches; None where nothing tells."""
    explicit = getattr(layer, "normalize_before", None)
    if explicit is not None:
        return bool(explicit)
    return next((before for name, before in _PRE_NORM.items() if hf.is_named(layer, name)), None)


def read_layer(module: Any) -> Layer | str:
    activation = activation_of(module.activation_fn)
    if activation is None:
        return f"its activation {type(module.activation_fn).__name__} is none that gelu_mlp has"
    if extra := extra_parts(module, *LAYER, "encoder_attn", "encoder_attn_layer_norm"):
        return extra
    pre_norm = _is_pre_norm(module)
    if pre_norm is None:
        return f"{type(module).__name__} does not tell whether it normalizes before or after"
    norms = [m for m in module.children() if isinstance(m, nn.LayerNorm)]
    if any(not norm.elementwise_affine or norm.bias is None for norm in norms):
        return "a LayerNorm without weight and bias"

    def residual(reads: str, branch: str | Mlp, norm: str) -> Residual:
        before, behind = (norm, None) if pre_norm else (None, norm)
        return Residual(reads, branch, before, norm=behind, optional=reads == "cross")

    evaluated, dropout = kind_of(module.activation_fn), "activation_dropout"
    mlp = Mlp("fc1", "fc2", "activation_fn", None, activation, evaluated, dropout)
    own = residual("self", "self_attn", "self_attn_layer_norm")
    last = residual("mlp", mlp, "final_layer_norm")
    clamps = "always" if pre_norm else "overflow"
    if not owns(module, "encoder_attn"):
        return Layer((own, last), ("attention_mask",), "dropout", clamps=clamps)
    cross = residual("cross", "encoder_attn", "encoder_attn_layer_norm")
    arguments = ("attention_mask", *_STATES, "use_cache")
    states = "key_value_states"
    return Layer((own, cross, last), arguments, "dropout", states, splits_cache=False)


def has_layers(module: nn.Module, decodes: bool) -> bool:
    layer = first_layer(module, "fc1")
    return layer is not None and owns(layer, "encoder_attn") == decodes


def is_stack(module: nn.Module, decodes: bool) -> bool:
    parts = has("layers", "embed_tokens", "embed_positions", "layernorm_embedding")
    return parts(module) and has_layers(module, decodes)


def read_stack(module: nn.Module, decodes: bool) -> Stack | str:
    stack = DECODER if decodes else ENCODER
    return replace(stack, norm="layer_norm") if owns(module, "layer_norm") else stack
