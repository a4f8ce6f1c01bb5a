"""The decoding step of BART's post-norm decoder, planned (`fastvlm.patching.steps`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm.decoding import cache as shared
from fastvlm.decoding import rows as kept
from fastvlm.decoding.prefixes import only_counts, starts_of
from fastvlm.nn.linear import is_plain
from fastvlm.patching.steps import At, CrossReads, Layer, Plan, SelfReads, product, products, quiet
from fastvlm.patching.tied import factor_of

_OPS = torch.ops.fastvlm


def plan(stack: Any, past: Any, layer_class: Any) -> Plan | None:
    """The step of a patched stack for its prefilled cache; None where modules must be called."""
    layers = []
    for index, layer in enumerate(stack.layers):
        if not isinstance(layer, layer_class) or layer.pre_norm:
            return None
        made = _layer(layer, past, index)
        if made is None:
            return None
        layers.append(made)
    if not _embeds(stack):
        return None
    return Plan(stack, layers)


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


def _tail(norm: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    if not is_plain(norm, nn.LayerNorm) or norm.bias is None:
        return None
    op, weight, bias, eps = _OPS.residual_layer_norm.default, norm.weight, norm.bias, norm.eps
    return lambda x, residual: op(x, residual, weight, bias, None, eps, 0.0)


def _mlp(layer: Any) -> Callable[[Tensor], Tensor] | None:
    fc1, fc2, tanh = layer.fc1, layer.fc2, layer.approximate == "tanh"
    if is_plain(fc1) and is_plain(fc2):
        op, weights = _OPS.gelu_mlp.default, (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return lambda x: op(x, *weights, None, tanh, 0.0, False)[0]
    up, down = product(fc1), product(fc2)
    if up is None or down is None:
        return None
    return lambda x: down(F.gelu(up(x), approximate=layer.approximate))


def _layer(layer: Any, past: Any, index: int) -> Layer | None:
    own, cross = layer.self_attn, layer.encoder_attn
    if not quiet(layer, own, cross, layer.activation_fn):
        return None
    linear = products(
        own.q_proj, own.k_proj, own.v_proj, own.out_proj, cross.q_proj, cross.out_proj
    )
    norms = (layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm)
    tails, mlp = [_tail(norm) for norm in norms], _mlp(layer)
    packed = shared.layer_of(past.cross_attention_cache, index)
    if linear is None or mlp is None or any(t is None for t in tails) or packed.packed is None:
        return None
    q, k, v, out, cross_q, cross_out = linear
    tail, cross_tail, mlp_tail = (t for t in tails if t is not None)
    reads = SelfReads(own, kept.layer_of(past.self_attention_cache, index), None, None)
    cross_reads = CrossReads(cross, packed, None)
    shape, cross_shape = (-1, own.head_dim), (-1, cross.head_dim)

    def run(x: Tensor, at: At) -> Tensor:
        query, key, value = (project(x).unflatten(1, shape) for project in (q, k, v))
        x = tail(out(reads(query, key, value, at.seen)), x)
        y = cross_reads(cross_q(x).unflatten(1, cross_shape), at.where)
        x = cross_tail(cross_out(y), x)
        return mlp_tail(mlp(x), x)

    return run
