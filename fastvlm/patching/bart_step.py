"""The decoding step of BART's post-norm decoder, planned (`fastvlm.patching.steps`)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm.decoding import cache as shared
from fastvlm.decoding import rows as kept
from fastvlm.decoding.prefixes import only_counts, starts_of
from fastvlm.nn.linear import is_plain
from fastvlm.nn.mlp import is_known_gelu
from fastvlm.patching.program import Program, Unplanned, quiet, require
from fastvlm.patching.steps import Plan
from fastvlm.patching.tied import factor_of


def plan(stack: Any, past: Any, layer_class: Any) -> Plan | None:
    """The step of a patched stack for its prefilled cache; None where modules must be called."""
    program = Program(stack.layernorm_embedding.weight.shape[0])
    x = 0
    try:
        require(_embeds(stack))
        for index, layer in enumerate(stack.layers):
            require(isinstance(layer, layer_class) and not layer.pre_norm)
            x = _layer(program, x, layer, past, index)
    except Unplanned:
        return None
    return Plan(stack, program)


def _embeds(stack: Any) -> bool:
    norm = stack.layernorm_embedding
    parts = stack.embed_tokens, norm
    offset = getattr(stack.embed_positions, "offset", None)
    known = factor_of(stack.embed_tokens) is not None and isinstance(offset, int)
    known = known and only_counts(stack.embed_positions)
    return known and quiet(*parts) and is_plain(norm, nn.LayerNorm) and norm.bias is not None


def embedded(stack: Any, ids: Tensor, filled: int) -> Tensor:
    """ids [R, 1] at position filled -> [R, d], less where a row starts if it is padded."""
    norm, places = stack.layernorm_embedding, stack.embed_positions
    x = F.embedding(ids[:, 0], stack.embed_tokens.weight)
    factor = factor_of(stack.embed_tokens)
    if factor is not None and factor != 1:
        x = x * factor
    at, starts = filled + places.offset, starts_of(places, x.shape[0])
    x = x + places.weight[at if starts is None else at - starts]
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _layer(program: Program, x: int, layer: Any, past: Any, index: int) -> int:
    own, cross = layer.self_attn, layer.encoder_attn
    require(quiet(layer, own, cross) and is_known_gelu(layer.activation_fn, layer.activation))
    q, k, v = program.linear(x, own.q_proj, own.k_proj, own.v_proj)
    cache = kept.layer_of(past.self_attention_cache, index)
    y = program.self_attention(q, k, v, own, cache)
    (y,) = program.linear(y, own.out_proj)
    x = program.residual_layer_norm(y, x, layer.self_attn_layer_norm)
    (y,) = program.linear(x, cross.q_proj)
    y = program.cross_attention(y, cross, shared.layer_of(past.cross_attention_cache, index))
    (y,) = program.linear(y, cross.out_proj)
    x = program.residual_layer_norm(y, x, layer.encoder_attn_layer_norm)
    y = program.gelu_mlp(x, layer.fc1, layer.fc2, layer.approximate)
    return program.residual_layer_norm(y, x, layer.final_layer_norm)
