"""The decoding step of Gemma-2's decoder, with or without Florenz's cross-attention, planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm.decoding import cache as shared
from fastvlm.decoding import rows as kept
from fastvlm.nn.linear import is_plain
from fastvlm.patching.steps import At, CrossReads, Layer, Plan, SelfReads, product, products, quiet
from fastvlm.patching.tied import factor_of

_OPS = torch.ops.fastvlm


def plan(stack: Any, past: Any, layer_class: type, fusable: Callable[[Any], bool]) -> Plan | None:
    """The step of a patched stack for its prefilled cache; None where modules must be called."""
    layers: list[Layer] = []
    for index, layer in enumerate(stack.layers):
        if not isinstance(layer, layer_class):
            return None
        made = _layer(layer, past, index, fusable)
        if made is None:
            return None
        layers.append(made)
    parts = stack.embed_tokens, stack.rotary_emb, stack.norm
    if factor_of(stack.embed_tokens) is None or not quiet(*parts) or not fusable(stack.norm):
        return None
    return Plan(stack, layers)


def embedded(stack: Any, ids: Tensor) -> Tensor:
    """ids [R, 1] -> [R, d]."""
    x = F.embedding(ids[:, 0], stack.embed_tokens.weight)
    factor = factor_of(stack.embed_tokens)
    return x if factor in (1, None) else x * factor


def _mlp(mlp: Any) -> Callable[[Tensor], Tensor] | None:
    parts = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    if not quiet(mlp) or any(part.bias is not None for part in parts if hasattr(part, "bias")):
        return None
    if all(map(is_plain, parts)):
        op, tanh = _OPS.geglu_mlp.default, mlp.approximate == "tanh"
        weights = [part.weight for part in parts]
        return lambda x: op(x, *weights, tanh, False)[0]
    found = products(*parts)
    if found is None:
        return None
    gate, up, down = found
    return lambda x: down(F.gelu(gate(x), approximate=mlp.approximate) * up(x))


def _layer(layer: Any, past: Any, index: int, fusable: Callable[[Any], bool]) -> Layer | None:
    own, cross = layer.self_attn, getattr(layer, "encoder_attn", None)
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm]
    linear = products(own.q_proj, own.k_proj, own.v_proj, own.o_proj)
    mlp = _mlp(layer.mlp)
    if linear is None or mlp is None or not quiet(layer, own):
        return None
    if not all(map(fusable, norms)) or len({(n.eps, n.offset) for n in norms}) > 1:
        return None
    first, post, pre_mlp, post_mlp = (norm.weight for norm in norms)
    numbers = norms[0].eps, norms[0].offset
    rms, tail, rope = (
        _OPS.rms_norm.default, _OPS.residual_rms_norm.default, _OPS.rope.default
    )  # fmt: skip
    cache = past.self_attention_cache if cross is not None else past
    reads = SelfReads(
        own, kept.layer_of(cache, index), own.sliding_window, own.attn_logit_softcapping
    )
    q, k, v, out = linear
    shape = -1, own.head_dim

    def attended(x: Tensor, at: At) -> Tensor:
        y = rms(x, first, *numbers)
        turned, key = rope(q(y).unflatten(1, shape), k(y).unflatten(1, shape), *at.rotation)
        return out(reads(turned, key, v(y).unflatten(1, shape), at.seen))

    def plain(x: Tensor, at: At) -> Tensor:
        h, y = tail(attended(x, at), x, post, None, pre_mlp, *numbers)
        return tail(mlp(y), h, post_mlp, None, None, *numbers)[0]

    if cross is None:
        return plain
    norm, gate = layer.post_encoder_attention_layernorm, layer.encoder_attn_gate
    packed = shared.layer_of(past.cross_attention_cache, index)
    cross_q, cross_out = product(cross.q_proj), product(cross.o_proj)
    ready = packed.packed is not None and quiet(cross) and fusable(norm)
    if not ready or cross_q is None or cross_out is None or (norm.eps, norm.offset) != numbers:
        return None
    cross_reads = CrossReads(cross, packed, cross.attn_logit_softcapping)
    cross_shape = -1, cross.head_dim

    def gated(x: Tensor, at: At) -> Tensor:
        h = tail(attended(x, at), x, post, None, None, *numbers)[0]
        y = cross_out(cross_reads(cross_q(h).unflatten(1, cross_shape), at.where))
        h, y = tail(y, h, norm.weight, gate, pre_mlp, *numbers)
        return tail(mlp(y), h, post_mlp, None, None, *numbers)[0]

    return gated
