"""GPT-2: norms before its branches, one product for queries, keys and values, learned positions.

Its layers hold their weights as [inputs, outputs] (transformers' Conv1D). A decoder of an encoder
has cross-attention between the two branches, and one product for its keys and values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fastvlm.models.spec import Attention, Embedding, Layer, Mlp, Residual, Stack
from fastvlm.models.structure import extra_parts, first_layer, has
from fastvlm.nn.mlp import activation_of, kind_of
from fastvlm.nn.wrapped import owns, unwrapped

KNOWN = ("transformers.models.gpt2.modeling_gpt2",)

_STATES = ("encoder_hidden_states", "encoder_attention_mask")
_SELF = Attention(
    "c_proj",
    ("past_key_values", "attention_mask", *_STATES, "output_attentions"),
    "attn_dropout",
    fused="c_attn",
    out_dropout="resid_dropout",
)
_CROSS = replace(
    _SELF,
    states="encoder_hidden_states",
    cross=True,
    mask="encoder_attention_mask",
    aliases=(("q_proj", "q_attn"),),
)
_ATTENTION = ("c_attn", "c_proj", "attn_dropout", "resid_dropout")
_MLP = ("c_fc", "c_proj", "act", "dropout")
_OWN = Residual("self", "attn", "ln_1")
_READS = Residual("cross", "crossattention", "ln_cross_attn", optional=True)
_LAST = Residual("mlp", "mlp", "ln_2")
_ARGUMENTS = ("past_key_values", "attention_mask", *_STATES, "use_cache")
LAYER = Layer(
    (_OWN, _READS, _LAST),
    _ARGUMENTS,
    splits_cache=False,
    cross_mask="encoder_attention_mask",
    bypasses=True,
)
ALONE = Stack(
    Embedding("wte", positions="wpe", given=True, told=("token_type_ids",)),
    (
        *("past_key_values", "attention_mask", "token_type_ids", "position_ids"),
        *("inputs_embeds", *_STATES, "use_cache"),
    ),
    ("attn",),
    norm="ln_f",
    reshapes=True,
    empty_mask=True,
    warns=True,
    aliases=(("layers", "h"),),
    by_layers=True,
)
DECODER = replace(ALONE, attentions=("attn", "crossattention"))
_STACK = ("wte", "wpe", "drop", "h", "ln_f")

_is_attention = has(*_ATTENTION, "split_size", "is_cross_attention", "scaling", "is_causal")
is_mlp = has(*_MLP)
is_layer = has("ln_1", "attn", "ln_2", "mlp")


def is_attention(module: Any) -> bool:
    return _is_attention(module) and owns(module, "q_attn") == bool(module.is_cross_attention)


def read_attention(module: Any) -> Attention | str:
    crosses = module.is_cross_attention
    parts = (*_ATTENTION, "q_attn") if crosses else _ATTENTION
    return extra_parts(module, *parts) or (_CROSS if crosses else _SELF)


def read_mlp(module: Any) -> Mlp | str:
    act = activation_of(module.act)
    if act is None:
        return f"its activation {type(module.act).__name__} is none that gelu_mlp has"
    if extra := extra_parts(module, *_MLP):
        return extra
    return Mlp("c_fc", "c_proj", "act", None, act, kind_of(module.act), out_dropout="dropout")


def read_layer(module: Any) -> Layer | str:
    if extra := extra_parts(module, *LAYER.parts):
        return extra
    norms = [part for part in module.children() if isinstance(part, nn.LayerNorm)]
    if any(not norm.elementwise_affine or norm.bias is None for norm in norms):
        return "a LayerNorm without weight and bias"
    return LAYER if owns(module, "crossattention") else replace(LAYER, residuals=(_OWN, _LAST))


def is_stack(module: Any) -> bool:
    if not has(*_STACK)(module) or extra_parts(module, *_STACK):
        return False
    layer = first_layer(module, "attn")
    attention = None if layer is None or not is_layer(layer) else unwrapped(layer.attn, "c_attn")
    return attention is not None and is_attention(attention)


def read_stack(module: Any) -> Stack | str:
    return DECODER if owns(first_layer(module, "attn"), "crossattention") else ALONE
