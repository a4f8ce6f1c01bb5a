"""Llama alone: RoPE, GQA, SwiGLU, an RMSNorm without an offset before each branch."""

from __future__ import annotations

from typing import Any

from fastvlm.models import gemma2
from fastvlm.models.mllama import is_self_attention
from fastvlm.models.spec import Attention, Embedding, Layer, Residual, Stack
from fastvlm.models.structure import extra_parts, first_layer, has
from fastvlm.nn.linear import original

KNOWN = ("transformers.models.llama.modeling_llama",)

ATTENTION = Attention(
    "o_proj",
    ("position_embeddings", "attention_mask", "past_key_values"),
    "attention_dropout",
    rotary=True,
)
LAYER = Layer(
    (
        Residual("self", "self_attn", "input_layernorm"),
        Residual("mlp", "mlp", "post_attention_layernorm"),
    ),
    ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings"),
    hands=("use_cache",),
    named=True,
)
STACK = Stack(
    Embedding(),
    ("attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"),
    norm="norm",
    rotary="rotary_emb",
    empty_mask=True,
)
_STACK = ("embed_tokens", "layers", "norm", "rotary_emb")

is_attention = is_self_attention
is_layer = has(*LAYER.parts)


def read_attention(module: Any) -> Attention | str:
    return extra_parts(module, *gemma2.PROJECTIONS) or ATTENTION


def read_layer(module: Any) -> Layer | str:
    return extra_parts(module, *LAYER.parts) or LAYER


def is_stack(module: Any) -> bool:
    """Llama's own, or a trainer's: half of transformers' decoders have its parts, and windows,
    factors or positions of their own."""
    home = original(type(module)).__module__
    if home.startswith("transformers.") and home not in KNOWN:
        return False
    if not has(*_STACK)(module) or extra_parts(module, *_STACK):
        return False
    layer = first_layer(module, "self_attn")
    return layer is not None and is_layer(layer) and not extra_parts(layer, *LAYER.parts)
