"""Mllama (Llama 3.2 Vision): Llama's layers, and between them layers that read an image.

A layer of the one kind has attention of its own rows, RoPE and GQA; of the other cross-attention
with norms of each head's queries and keys. Gates (tanh) stand before what the branches of the
latter give, and rows that see no image get nothing of its MLP. SwiGLU, RMSNorm without an offset.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvlm.compat.versions import is_tested
from fastvlm.models import gemma2
from fastvlm.models.spec import Attention, Embedding, Layer, Residual, Stack
from fastvlm.models.structure import extra_parts, has, layers_of
from fastvlm.nn.linear import original
from fastvlm.nn.wrapped import owns, unwrapped

KNOWN = ("transformers.models.mllama.modeling_mllama",)

# with what rows are multiplied that see no image: 0, and 1 where they see one
FACTORS = "full_text_row_masked_out_mask"
_STATES = ("cross_attention_states", "cross_attention_mask")
SELF_ATTENTION = Attention(
    "o_proj",
    ("attention_mask", "position_embeddings", "past_key_values"),
    "dropout",
    rotary=True,
)
CROSS_ATTENTION = Attention(
    "o_proj",
    (_STATES[0], "past_key_values", "attention_mask"),
    "dropout",
    states=_STATES[0],
    cross=True,
    norms=("q_norm", "k_norm"),
    keeps_states=True,
)
_ARGUMENTS = (
    *(*_STATES, "attention_mask", FACTORS, "position_ids"),
    *("past_key_values", "use_cache", "position_embeddings"),
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
SELF_LAYER = Layer(
    (Residual("self", "self_attn", _NORMS[0]), Residual("mlp", "mlp", _NORMS[1])),
    _ARGUMENTS,
    given=_STATES[0],
    named=True,
    bypasses=True,
)
CROSS_LAYER = Layer(
    (
        Residual("cross", "cross_attn", _NORMS[0], gate="cross_attn_attn_gate"),
        Residual("mlp", "mlp", _NORMS[1], gate="cross_attn_mlp_gate", factors=FACTORS),
    ),
    _ARGUMENTS,
    states=_STATES[0],
    given=_STATES[0],
    named=True,
    bypasses=True,
)
STACK = Stack(
    Embedding(),
    (
        *("attention_mask", "position_ids", *_STATES, FACTORS),
        *("past_key_values", "inputs_embeds", "use_cache"),
    ),
    ("self_attn", "cross_attn"),
    interleaved=True,
    states=_STATES,
    norm="norm",
    rotary="rotary_emb",
    empty_mask=True,
    ignores_cross_mask=True,  # it is no mask of two dimensions: our stack reads it
)
_STACK = ("embed_tokens", "layers", "norm", "rotary_emb")
_HEAD_NORMS = ("q_norm", "k_norm")

_has_projections = has(*gemma2.PROJECTIONS, "num_key_value_groups", "head_dim", "scaling")


def is_self_attention(module: nn.Module) -> bool:
    return _has_projections(module) and owns(module, "is_causal")


def is_cross_attention(module: nn.Module) -> bool:
    return _has_projections(module) and has(*_HEAD_NORMS)(module)


def read_self_attention(module: Any) -> Attention | str:
    return extra_parts(module, *gemma2.PROJECTIONS) or SELF_ATTENTION


def read_cross_attention(module: Any) -> Attention | str:
    return extra_parts(module, *gemma2.PROJECTIONS, *_HEAD_NORMS) or CROSS_ATTENTION


def is_layer(module: nn.Module) -> bool:
    return has(*SELF_LAYER.parts)(module) or has(*CROSS_LAYER.parts)(module)


def read_layer(module: Any) -> Layer | str:
    layer = CROSS_LAYER if owns(module, "cross_attn") else SELF_LAYER
    return extra_parts(module, *layer.parts) or layer


def is_stack(module: Any) -> bool:
    if not has(*_STACK, "cross_attention_layers")(module):
        return False
    layers = layers_of(module)
    return layers is not None and any(unwrapped(layer, "cross_attn") for layer in layers)


def read_stack(module: Any) -> Stack | str:
    if extra := extra_parts(module, *_STACK):
        return extra
    if original(type(module)).__module__ not in KNOWN or not is_tested("transformers"):
        return "only transformers' own, in versions that were tested: a copy cannot be tried"
    crosses = {
        index
        for index, layer in enumerate(layers_of(module))
        if unwrapped(layer, "cross_attn") is not None
    }
    if 0 in crosses:
        return "its first layer reads an image, so that its cache counts no tokens"
    if crosses != set(module.cross_attention_layers):
        return f"its cross_attention_layers are {module.cross_attention_layers}, and others are so"
    return STACK
