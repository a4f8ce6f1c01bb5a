"""BERT and its copies (RoBERTa, XLM-RoBERTa, CamemBERT, Electra, BertGeneration) as decoders:
BART's layers, whose projections and norms stand in modules of their own.

Only what its configuration calls a decoder: encoders are none of this.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import nn

from fastvlm.compat import hf
from fastvlm.models.spec import Attention, Embedding, Layer, Mlp, Residual, Stack
from fastvlm.models.structure import (
    extra_parts,
    has,
    layer_in,
    layers_and_owner,
    layers_of,
    part_of,
    submodule,
    takes,
)
from fastvlm.nn.mlp import activation_of, kind_of
from fastvlm.nn.wrapped import owns

_NAMES = ("bert", "roberta", "xlm_roberta", "camembert", "electra", "bert_generation")
KNOWN = tuple(f"transformers.models.{name}.modeling_{name}" for name in _NAMES)

_PROJECTIONS = ("query", "key", "value")
OWN, CROSS = "attention.self", "crossattention.self"
_ALIASES = (
    *(("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")),
    ("head_dim", "attention_head_size"),
)
ROWS = Attention(None, ("attention_mask", "past_key_values"), "dropout", aliases=_ALIASES)
_STATES = Attention(
    None,
    ("encoder_hidden_states", "attention_mask", "past_key_values"),
    "dropout",
    states="encoder_hidden_states",
    cross=True,
    aliases=_ALIASES,
)
_ARGUMENTS = (
    *("attention_mask", "encoder_hidden_states", "encoder_attention_mask", "past_key_values"),
)
# modules of a layer that only hold its parts, and what is in them
_HOLDERS = {
    "attention": ("self", "output"),
    "attention.output": ("dense", "LayerNorm", "dropout"),
    "crossattention": ("self", "output"),
    "crossattention.output": ("dense", "LayerNorm", "dropout"),
    "intermediate": ("dense", "intermediate_act_fn"),
    "output": ("dense", "LayerNorm", "dropout"),
}
_ACT = "intermediate.intermediate_act_fn"

# what the arguments of a stack may be; more than these change what it computes
_ARGUMENT_NAMES = {
    *("token_type_ids", "position_ids", "inputs_embeds", "use_cache", "encoder_embeds"),
    *(*_ARGUMENTS, "is_decoder"),
}
_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_STACK = Stack(
    Embedding(),
    attentions=(OWN,),
    aliases=(("layers", "encoder.layer"), ("embed_tokens", "embeddings.word_embeddings")),
    causal="config.is_decoder",
    holders=tuple(_HOLDERS),
)

_is_attention = has(*_PROJECTIONS, "attention_head_size", "layer_idx")
_is_layer = has("attention", "intermediate", "output", "chunk_size_feed_forward")


def is_attention(module: Any) -> bool:
    return _is_attention(module) and isinstance(module.query, nn.Module)


def is_layer(module: Any) -> bool:
    return _is_layer(module) and submodule(module, OWN) is not None


def read_attention(module: Any) -> Attention | str:
    if extra := extra_parts(module, *_PROJECTIONS, "dropout"):
        return extra
    if getattr(module, "position_embedding_type", "absolute") != "absolute":
        return "its scores have a bias of relative positions"
    if takes(module, "encoder_hidden_states"):
        return _STATES
    if not module.is_causal:
        return "it decodes, and does not say that its rows see only those before them"
    return ROWS


def read_layer(module: Any, arguments: tuple[str, ...] = _ARGUMENTS) -> Layer | str:
    names = {name.partition(".")[0] for name in _HOLDERS}
    if extra := extra_parts(module, *names):
        return extra
    if module.chunk_size_feed_forward > 0:
        return "its chunk_size_feed_forward asks for the MLP in pieces"
    crosses = owns(module, "crossattention")
    for path, parts in _HOLDERS.items():
        holder = submodule(module, path)
        if holder is None and not crosses and path.startswith("cross"):
            continue
        if holder is None or not all(owns(holder, part) for part in parts):
            return f"its {path} has other parts than {', '.join(parts)}"
        if extra := extra_parts(holder, *parts):
            return f"its {path}: {extra}"
        if "LayerNorm" in parts and not _is_norm(holder.LayerNorm):
            return f"its {path} has no LayerNorm with weight and bias"
    act = part_of(module, _ACT)
    activation = activation_of(act) if isinstance(act, nn.Module) else None
    if activation is None:
        return f"its activation {type(act).__name__} is none that gelu_mlp has"
    mlp = Mlp("intermediate.dense", "output.dense", _ACT, None, activation, kind_of(act))

    def residual(reads: str, branch: str | Mlp, holder: str) -> Residual:
        out = f"{holder}.dense" if isinstance(branch, str) else None
        norm, dropout = f"{holder}.LayerNorm", f"{holder}.dropout"
        optional = reads == "cross"
        return Residual(reads, branch, norm=norm, dropout=dropout, project=out, optional=optional)

    residuals = [residual("self", OWN, "attention.output"), residual("mlp", mlp, "output")]
    if crosses:
        residuals.insert(1, residual("cross", CROSS, "crossattention.output"))
    return Layer(tuple(residuals), arguments, splits_cache=False, bypasses=True)


def _is_norm(norm: Any) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def first_layer(module: Any) -> Any:
    """The first layer of what has embeddings and layers as BERT has them; None without."""
    if not has("embeddings", "encoder")(module):
        return None
    layers = layers_of(module)
    layer = layer_in(layers[0], OWN) if layers else None
    return layer if layer is not None and is_layer(layer) else None


def is_stack(module: Any) -> bool:
    layer = first_layer(module)
    return layer is not None and getattr(layer, "is_decoder", False) is True


def read_stack(module: Any) -> Stack | str:
    if module._modules.get("pooler") is not None:
        return "its pooler reads its first row"
    if extra := extra_parts(module, "embeddings", "encoder", "pooler"):
        return extra
    if extra := extra_parts(layers_and_owner(module)[1], "layer"):
        return f"its encoder: {extra}"
    if extra := extra_parts(module.embeddings, *_TABLES, "LayerNorm", "dropout"):
        return f"its embeddings: {extra}"
    signature = list(inspect.signature(type(module).forward).parameters.values())[2:]
    names = [p.name for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD]
    arguments = tuple("past_key_values" if n == hf.cache_argument() else n for n in names)
    if unknown := sorted(set(arguments) - _ARGUMENT_NAMES):
        return f"its forward has arguments of its own: {', '.join(unknown)}"
    types = "token_type_embeddings"
    embedding = Embedding(
        "embeddings.word_embeddings",
        positions="embeddings.position_embeddings",
        given=True,
        norm="embeddings.LayerNorm",
        skips="embeddings.padding_idx" if owns(module.embeddings, "padding_idx") else None,
        types=f"embeddings.{types}" if owns(module.embeddings, types) else None,
        told=("token_type_ids", "encoder_embeds"),
        holder="embeddings",
    )
    crosses = owns(first_layer(module), "crossattention")
    return replace(
        _STACK,
        embedding=embedding,
        arguments=arguments,
        attentions=(OWN, CROSS) if crosses else (OWN,),
    )
