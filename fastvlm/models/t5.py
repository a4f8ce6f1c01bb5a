"""T5, Flan, mT5, UMT5: scores with a bias of the distance and no scale, RMSNorm, ReLU or a gate.

A layer's branches stand one level down, each in a module of its own with its norm and its dropout.
The table of the bias is the first layer's, which hands it on (T5), or each layer has one (UMT5).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fastvlm.compat import hf
from fastvlm.models.spec import Attention, Embedding, Layer, Mlp, Residual, Stack
from fastvlm.models.structure import extra_parts, has, layers_of, submodule, takes
from fastvlm.nn.mlp import activation_of, kind_of
from fastvlm.nn.wrapped import owns, unwrapped

KNOWN = tuple(f"transformers.models.{name}.modeling_{name}" for name in ("t5", "mt5", "umt5"))

_PROJECTIONS = ("q", "k", "v", "o")
_BIAS = "relative_attention_bias"
ATTENTION = Attention(
    "o",
    ("mask", "key_value_states", "position_bias", "past_key_values"),
    "dropout",
    states="key_value_states",
    mask="mask",
    bias=_BIAS,
    shares_bias=True,
    aliases=(
        *(("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")),
        ("head_dim", "key_value_proj_dim"),
    ),
)
_UNSHARED = replace(
    ATTENTION,
    arguments=("encoder_hidden_states", "past_key_values", "attention_mask"),
    states="encoder_hidden_states",
    mask="attention_mask",
    shares_bias=False,
)
_SELF, _CROSS = "layer.0.SelfAttention", "layer.1.EncDecAttention"
_STATES = ("encoder_hidden_states", "encoder_attention_mask")
_EMBEDDING = Embedding()
_STACK = {
    "norm": "final_layer_norm",
    "aliases": (("layers", "block"),),
    "has_bias": True,
    "on_cpu": "its scores have a bias of the distance",
    "holders": ("layer.0", "layer.1", "layer.2"),
}
ENCODER = Stack(_EMBEDDING, ("attention_mask",), (_SELF,), **_STACK)  # type: ignore[arg-type]
DECODER = Stack(
    _EMBEDDING,
    ("attention_mask", *_STATES, "inputs_embeds", "past_key_values", "use_cache"),
    (_SELF, _CROSS),
    **_STACK,  # type: ignore[arg-type]
)
_STACK_PARTS = ("embed_tokens", "block", "final_layer_norm", "dropout")

is_attention = has(*_PROJECTIONS, "key_value_proj_dim", "scaling", "is_causal", "layer_idx")


def is_norm(module: Any) -> bool:
    return hf.is_named(module, "T5LayerNorm") and owns(module, "variance_epsilon")


def is_mlp(module: nn.Module) -> bool:
    return has("wo", "act", "dropout")(module) and (owns(module, "wi") or owns(module, "wi_0"))


def is_layer(module: Any) -> bool:
    parts = module._modules.get("layer")
    if not isinstance(parts, nn.ModuleList) or len(parts) < 2:
        return False
    return owns(parts[0], "SelfAttention") and owns(parts[-1], "DenseReluDense")


def read_attention(module: Any) -> Attention | str:
    if extra := extra_parts(module, *_PROJECTIONS, _BIAS):
        return extra
    # UMT5's of transformers 5.17, which its sdpa lets see what comes where there is no mask
    if owns(module, _BIAS) and module.is_decoder and not module.is_causal:
        return "it decodes, and does not say that its rows see only those before them"
    return ATTENTION if takes(module, "position_bias") else _UNSHARED


def read_mlp(module: Any) -> Mlp | str:
    act = activation_of(module.act)
    if act is None:
        return f"its activation {type(module.act).__name__} is none that the MLP ops have"
    gated = owns(module, "wi_0")
    first = ("wi_0", "wi_1") if gated else ("wi",)
    if extra := extra_parts(module, *first, "wo", "act", "dropout"):
        return extra
    gate = "wi_0" if gated else None
    return Mlp(first[-1], "wo", "act", gate, act, kind_of(module.act), "dropout")


def branches_of(module: Any, places: dict[str, tuple[str, str]]) -> tuple[Residual, ...] | str:
    """What a layer adds up. places: by what it reads, where each branch stands: in a module that
    holds it with its norm and its dropout, and under which name."""
    residuals = []
    for reads, (holder, name) in places.items():
        part: Any = submodule(module, holder)
        parts = (name, "layer_norm", "dropout")
        whole = part is not None and all(each in part._modules for each in parts)
        if not whole or extra_parts(part, *parts):
            return f"its {holder} has other parts than {', '.join(parts)}"
        branch, before, dropout = (f"{holder}.{each}" for each in parts)
        residuals.append(
            Residual(reads, branch, before, dropout=dropout, optional=reads == "cross")
        )
    return tuple(residuals)


def read_layer(module: Any) -> Layer | str:
    if extra := extra_parts(module, "layer"):
        return extra
    branches = {"self": "SelfAttention", "cross": "EncDecAttention", "mlp": "DenseReluDense"}
    if not module.is_decoder:
        del branches["cross"]
    if len(module.layer) != len(branches):
        return f"it has {len(module.layer)} branches, not {len(branches)}"
    places = {reads: (f"layer.{i}", name) for i, (reads, name) in enumerate(branches.items())}
    residuals = branches_of(module, places)
    if isinstance(residuals, str):
        return residuals
    shares = takes(module, "position_bias")
    of_bias = ("position_bias", "encoder_decoder_position_bias") if shares else ()
    return Layer(
        residuals,
        ("attention_mask", *of_bias[:1], *_STATES, *of_bias[1:], "past_key_values"),
        states="key_value_states" if shares else "encoder_hidden_states",
        mask="mask" if shares else "attention_mask",
        splits_cache=False,
        clamps="infinite",
        shares_bias=shares,
        bypasses=True,
    )


def is_stack(module: Any, decodes: bool) -> bool:
    if not has(*_STACK_PARTS)(module) or extra_parts(module, *_STACK_PARTS):
        return False
    layers = layers_of(module)
    layer = unwrapped(layers[0], "layer") if layers else None
    if layer is None or not is_layer(layer):
        return False
    return _crosses(layer) == decodes


def _crosses(layer: Any) -> bool:
    return any(owns(part, "EncDecAttention") for part in layer.layer)


def read_stack(module: nn.Module, decodes: bool) -> Stack | str:
    return DECODER if decodes else ENCODER
