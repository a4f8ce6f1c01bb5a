"""Pix2Struct's text decoder: T5's layers by other names, in a stack with its own head and loss.

Of its vision encoder the MLPs and norms are T5's as well; its attention gets nothing handed down
that could stand in place of a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from fastvlm.compat import hf
from fastvlm.models import t5
from fastvlm.models.spec import Attention, Layer, Stack
from fastvlm.models.structure import extra_parts, has, layer_in, layers_of
from fastvlm.nn.wrapped import owns

KNOWN = ("transformers.models.pix2struct.modeling_pix2struct",)

_PROJECTIONS = ("query", "key", "value", "output")
_BIAS = "relative_attention_bias"
_ATTENTION = replace(
    t5.ATTENTION,
    out="output",
    aliases=(
        *(("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")),
        ("head_dim", "key_value_proj_dim"),
    ),
)
_BRANCHES = {
    "self": ("self_attention", "attention"),
    "cross": ("encoder_decoder_attention", "attention"),
    "mlp": ("mlp", "DenseReluDense"),
}
_HOLDERS = tuple(holder for holder, _ in _BRANCHES.values())
OWN, CROSS = (".".join(_BRANCHES[reads]) for reads in ("self", "cross"))
# what reaches its layers: whether they fill a cache, which they do by the cache alone
_HANDS = "use_cache"
_STATES = ("encoder_hidden_states", "encoder_attention_mask")
_STACK = replace(
    t5.DECODER,
    arguments=(
        *("attention_mask", *_STATES, "inputs_embeds", "past_key_values", _HANDS),
        *("output_attentions", "output_hidden_states", "labels", "return_dict"),
    ),
    attentions=(OWN, CROSS),
    aliases=(("layers", "layer"),),
    holders=_HOLDERS,
    empty_mask=True,
    hands=_HANDS,
    causal="config.is_decoder",
    head="lm_head",
)
_STACK_PARTS = ("embed_tokens", "layer", "final_layer_norm", "dropout", "lm_head")
_TOWER_LAYER = ("attention", "mlp", "pre_mlp_layer_norm", "pre_attention_layer_norm")

is_attention = has(*_PROJECTIONS, "key_value_proj_dim", "scaling", "is_causal", "layer_idx")
is_layer = has(*_HOLDERS)
is_tower_layer = has(*_TOWER_LAYER)


def is_norm(module: Any) -> bool:
    return hf.is_named(module, "Pix2StructLayerNorm") and owns(module, "variance_epsilon")


def read_attention(module: Any) -> Attention | str:
    if extra := extra_parts(module, *_PROJECTIONS, _BIAS):
        return extra
    if owns(module, _BIAS) and not module.is_causal:
        return "it does not say that its rows see only those before them"
    if module.n_heads * module.key_value_proj_dim != module.query.out_features:
        return f"its rows are not of {module.n_heads} heads of {module.key_value_proj_dim}"
    return _ATTENTION


def read_layer(module: Any) -> Layer | str:
    if extra := extra_parts(module, *_HOLDERS):
        return extra
    residuals = t5.branches_of(module, _BRANCHES)
    if isinstance(residuals, str):
        return residuals
    bias = ("position_bias", "encoder_decoder_position_bias")
    return Layer(
        residuals,
        ("attention_mask", bias[0], *_STATES, bias[1], "past_key_values", _HANDS),
        states="key_value_states",
        mask="mask",
        splits_cache=False,
        clamps="infinite",
        handed=_HANDS,
        shares_bias=True,
        results=5,
        bypasses=True,
    )


def is_stack(module: Any) -> bool:
    if not has(*_STACK_PARTS)(module):
        return False
    layers = layers_of(module)
    layer = layer_in(layers[0], OWN) if layers else None
    return layer is not None and is_layer(layer)


def read_stack(module: Any) -> Stack | str:
    return extra_parts(module, *_STACK_PARTS) or _STACK


def tower_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of vision encoders, and the norms behind them."""
    for name, module in model.named_modules():
        if is_tower_layer(module):
            yield name, module
        if (norm := module._modules.get("layernorm")) is not None and is_norm(norm):
            yield f"{name}.layernorm" if name else "layernorm", norm
