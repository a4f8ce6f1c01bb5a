"""The decoding step of Gemma-2's decoder, of Florenz's and of T5Gemma's, planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastvlm.decoding import cache as shared
from fastvlm.decoding import rows as kept
from fastvlm.patching.program import Program, Unplanned, quiet, require
from fastvlm.patching.steps import Plan
from fastvlm.patching.tied import factor_of

Fusable = Callable[[Any], bool]


def plan(stack: Any, past: Any, layer_class: type, fusable: Fusable) -> Plan | None:
    """The step of a patched stack for its prefilled cache; None where modules must be called."""
    program = Program(stack.norm.weight.shape[0])
    x = 0
    try:
        require(factor_of(stack.embed_tokens) is not None and fusable(stack.norm))
        require(quiet(stack.embed_tokens, stack.rotary_emb, stack.norm))
        for index, layer in enumerate(stack.layers):
            require(isinstance(layer, layer_class) and quiet(layer))
            write = _t5_layer if hasattr(layer, "cross_attn") else _layer
            x = write(program, x, layer, past, index, fusable)
    except Unplanned:
        return None
    return Plan(stack, program)


def embedded(stack: Any, ids: Tensor) -> Tensor:
    """ids [R, 1] -> [R, d]."""
    x = F.embedding(ids[:, 0], stack.embed_tokens.weight)
    factor = factor_of(stack.embed_tokens)
    return x if factor in (1, None) else x * factor


def _numbers(norms: list[Any], fusable: Fusable) -> tuple[float, float]:
    """eps and offset of all of them."""
    require(all(map(fusable, norms)) and len({(n.eps, n.offset) for n in norms}) == 1)
    return norms[0].eps, norms[0].offset


def _self(program: Program, x: int, own: Any, layer: Any) -> int:
    """SelfAttn of rows that are normalized, appending to layer."""
    require(quiet(own))
    q, k, v = program.linear(x, own.q_proj, own.k_proj, own.v_proj)
    q, k = program.rope(q, k, own.head_dim)
    window, softcap = own.sliding_window, own.attn_logit_softcapping
    y = program.self_attention(q, k, v, own, layer, window, softcap)
    return program.linear(y, own.o_proj)[0]


def _cross(program: Program, x: int, cross: Any, past: Any, index: int) -> int:
    """CrossAttn against the keys and values of the cache."""
    require(quiet(cross))
    (q,) = program.linear(x, cross.q_proj)
    layer = shared.layer_of(past.cross_attention_cache, index)
    y = program.cross_attention(q, cross, layer, cross.attn_logit_softcapping)
    return program.linear(y, cross.o_proj)[0]


def _t5_layer(program: Program, x: int, layer: Any, past: Any, index: int, fusable: Fusable) -> int:
    norms = [layer.pre_self_attn_layernorm, layer.post_self_attn_layernorm]
    norms += [layer.pre_cross_attn_layernorm, layer.post_cross_attn_layernorm]
    norms += [layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm]
    numbers = _numbers(norms, fusable)
    first, post, pre_cross, post_cross, pre_mlp, post_mlp = (norm.weight for norm in norms)
    y = program.rms_norm(x, first, *numbers)
    y = _self(program, y, layer.self_attn, kept.layer_of(past.self_attention_cache, index))
    h, y = program.residual_rms_norm(y, x, post, *numbers, next_weight=pre_cross)
    y = _cross(program, y, layer.cross_attn, past, index)
    h, y = program.residual_rms_norm(y, h, post_cross, *numbers, next_weight=pre_mlp)
    return program.residual_rms_norm(program.geglu_mlp(y, layer.mlp), h, post_mlp, *numbers)[0]


def _layer(program: Program, x: int, layer: Any, past: Any, index: int, fusable: Fusable) -> int:
    cross = getattr(layer, "encoder_attn", None)
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm]
    norms += [] if cross is None else [layer.post_encoder_attention_layernorm]
    numbers = _numbers(norms, fusable)
    first, post, pre_mlp, post_mlp = (norm.weight for norm in norms[:4])
    cache = past.self_attention_cache if cross is not None else past
    y = program.rms_norm(x, first, *numbers)
    y = _self(program, y, layer.self_attn, kept.layer_of(cache, index))
    if cross is None:
        h, y = program.residual_rms_norm(y, x, post, *numbers, next_weight=pre_mlp)
    else:
        (h,) = program.residual_rms_norm(y, x, post, *numbers)
        y = _cross(program, h, cross, past, index)
        gate = layer.encoder_attn_gate
        h, y = program.residual_rms_norm(
            y, h, norms[4].weight, *numbers, gate=gate, next_weight=pre_mlp
        )
    return program.residual_rms_norm(program.geglu_mlp(y, layer.mlp), h, post_mlp, *numbers)[0]
