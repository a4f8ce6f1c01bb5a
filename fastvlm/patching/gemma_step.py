"""The decoding step of Gemma-2's decoder, of Florenz's and of T5Gemma's, planned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastvlm.decoding import cache as shared
from fastvlm.decoding import rows as kept
from fastvlm.patching.attention import softcap_of
from fastvlm.patching.program import Program, Unplanned, quiet, require
from fastvlm.patching.steps import Plan
from fastvlm.patching.tied import factor_of

Fusable = Callable[[Any], bool]
# a branch, the residual and the weight of the norm behind the branch -> h, and y with next_weight
Tail = Callable[..., list[int]]


def plan(stack: Any, past: Any, layer_class: type, fusable: Fusable) -> Plan | None:
    """The step of a patched stack for its prefilled cache; None where modules must be called.

    A layer's last norm also makes what the first norm after it would, the next layer's or the
    stack's: one launch for two.
    """
    try:
        return Plan(stack, _written(stack, past, layer_class, fusable))
    except Unplanned:
        return None


def _written(stack: Any, past: Any, layer_class: type, fusable: Fusable) -> Program:
    require(quiet(stack.embed_tokens, stack.rotary_emb, stack.norm, *stack.layers))
    require(factor_of(stack.embed_tokens) is not None)
    require(all(isinstance(layer, layer_class) for layer in stack.layers))
    norms = [_norms(layer) for layer in stack.layers]
    every = [norm for found in (*norms, [stack.norm]) for norm in found]
    require(all(map(fusable, every)) and len({(n.eps, n.offset) for n in every}) == 1)
    eps, offset = every[0].eps, every[0].offset
    following = [*(found[0].weight for found in norms[1:]), stack.norm.weight]
    program = Program(stack.norm.weight.shape[0])
    h, y = 0, program.rms_norm(0, norms[0][0].weight, eps, offset)
    for index, layer in enumerate(stack.layers):
        write = _t5_layer if hasattr(layer, "cross_attn") else _layer
        weights = [norm.weight for norm in norms[index][1:]]
        tail = partial(program.residual_rms_norm, eps=eps, offset=offset)
        h, y = write(program, h, y, layer, past, index, (*weights, following[index]), tail)
    return program


def _norms(layer: Any) -> list[Any]:
    """Of a layer, in the order in which they are computed."""
    if hasattr(layer, "cross_attn"):
        kinds = ("self_attn", "cross_attn", "feedforward")
        return [
            getattr(layer, f"{at}_{kind}_layernorm") for kind in kinds for at in ("pre", "post")
        ]
    found = [layer.input_layernorm, layer.post_attention_layernorm]
    if getattr(layer, "encoder_attn", None) is not None:
        found.append(layer.post_encoder_attention_layernorm)
    return [*found, layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm]


def embedded(stack: Any, ids: Tensor) -> Tensor:
    """ids [R, 1] -> [R, d]."""
    x = F.embedding(ids[:, 0], stack.embed_tokens.weight)
    factor = factor_of(stack.embed_tokens)
    return x if factor in (1, None) else x * factor


def _self(program: Program, x: int, own: Any, layer: Any) -> int:
    """SelfAttn of rows that are normalized, appending to layer."""
    require(quiet(own))
    q, k, v = program.linear(x, own.q_proj, own.k_proj, own.v_proj)
    q, k = program.rope(q, k, own.head_dim)
    window, softcap = own.sliding_window, softcap_of(own)
    y = program.self_attention(q, k, v, own, layer, window, softcap)
    return program.linear(y, own.o_proj)[0]


def _cross(program: Program, x: int, cross: Any, past: Any, index: int) -> int:
    """CrossAttn against the keys and values of the cache."""
    require(quiet(cross))
    (q,) = program.linear(x, cross.q_proj)
    layer = shared.layer_of(past.cross_attention_cache, index)
    y = program.cross_attention(q, cross, layer, softcap_of(cross))
    return program.linear(y, cross.o_proj)[0]


def _t5_layer(
    program: Program, h: int, y: int, layer: Any, past: Any, index: int, norms: Any, tail: Tail
) -> list[int]:
    """norms: the weights behind the first, and that of the norm after the layer."""
    post, pre_cross, post_cross, pre_mlp, post_mlp, following = norms
    y = _self(program, y, layer.self_attn, kept.layer_of(past.self_attention_cache, index))
    h, y = tail(y, h, post, next_weight=pre_cross)
    y = _cross(program, y, layer.cross_attn, past, index)
    h, y = tail(y, h, post_cross, next_weight=pre_mlp)
    return tail(program.geglu_mlp(y, layer.mlp), h, post_mlp, next_weight=following)


def _layer(
    program: Program, h: int, y: int, layer: Any, past: Any, index: int, norms: Any, tail: Tail
) -> list[int]:
    """norms: as in `_t5_layer`; three of them are those of the MLP and of what follows."""
    cross = getattr(layer, "encoder_attn", None)
    post, *of_cross, pre_mlp, post_mlp, following = norms
    cache = past.self_attention_cache if cross is not None else past
    y = _self(program, y, layer.self_attn, kept.layer_of(cache, index))
    if cross is None:
        h, y = tail(y, h, post, next_weight=pre_mlp)
    else:
        (h,) = tail(y, h, post)
        y = _cross(program, h, cross, past, index)
        h, y = tail(y, h, *of_cross, gate=layer.encoder_attn_gate, next_weight=pre_mlp)
    return tail(program.geglu_mlp(y, layer.mlp), h, post_mlp, next_weight=following)
