"""The decoding step of Gemma-2's decoder, of Florenz's and of T5Gemma's, planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm.decoding import cache as shared
from fastvlm.decoding import rows as kept
from fastvlm.nn.linear import is_plain
from fastvlm.patching.steps import At, CrossReads, Layer, Plan, SelfReads, products, quiet
from fastvlm.patching.tied import factor_of

_OPS = torch.ops.fastvlm


def plan(stack: Any, past: Any, layer_class: type, fusable: Callable[[Any], bool]) -> Plan | None:
    """The step of a patched stack for its prefilled cache; None where modules must be called."""
    layers: list[Layer] = []
    for index, layer in enumerate(stack.layers):
        if not isinstance(layer, layer_class):
            return None
        make = _t5_layer if hasattr(layer, "cross_attn") else _layer
        made = make(layer, past, index, fusable)
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


def _numbers(norms: list[Any], fusable: Callable[[Any], bool]) -> tuple[float, float] | None:
    """eps and offset of all of them; None where they differ, or one must be called."""
    if not all(map(fusable, norms)) or len({(n.eps, n.offset) for n in norms}) > 1:
        return None
    return norms[0].eps, norms[0].offset


def _self(
    own: Any, layer: Any, norm: Tensor, numbers: tuple[float, float]
) -> Callable[[Tensor, At], Tensor] | None:
    """x -> SelfAttn(RMS(x)), appending to layer."""
    linear = products(own.q_proj, own.k_proj, own.v_proj, own.o_proj)
    if linear is None or not quiet(own):
        return None
    reads = SelfReads(own, layer, own.sliding_window, own.attn_logit_softcapping)
    rms, rope, shape = _OPS.rms_norm.default, _OPS.rope.default, (-1, own.head_dim)
    q, k, v, out = linear

    def run(x: Tensor, at: At) -> Tensor:
        y = rms(x, norm, *numbers)
        turned, key = rope(q(y).unflatten(1, shape), k(y).unflatten(1, shape), *at.rotation)
        return out(reads(turned, key, v(y).unflatten(1, shape), at.seen))

    return run


def _cross(cross: Any, past: Any, index: int) -> Callable[[Tensor, At], Tensor] | None:
    """x -> CrossAttn(x) against the keys and values of the cache."""
    packed = shared.layer_of(past.cross_attention_cache, index)
    linear = products(cross.q_proj, cross.o_proj)
    if packed.packed is None or linear is None or not quiet(cross):
        return None
    reads, shape = CrossReads(cross, packed, cross.attn_logit_softcapping), (-1, cross.head_dim)
    q, out = linear
    return lambda x, at: out(reads(q(x).unflatten(1, shape), at.where))


def _t5_layer(layer: Any, past: Any, index: int, fusable: Callable[[Any], bool]) -> Layer | None:
    norms = [layer.pre_self_attn_layernorm, layer.post_self_attn_layernorm]
    norms += [layer.pre_cross_attn_layernorm, layer.post_cross_attn_layernorm]
    norms += [layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm]
    numbers, mlp = _numbers(norms, fusable), _mlp(layer.mlp)
    if numbers is None or mlp is None or not quiet(layer):
        return None
    first, post, pre_cross, post_cross, pre_mlp, post_mlp = (norm.weight for norm in norms)
    own = kept.layer_of(past.self_attention_cache, index)
    attended = _self(layer.self_attn, own, first, numbers)
    read = _cross(layer.cross_attn, past, index)
    if attended is None or read is None:
        return None
    tail = _OPS.residual_rms_norm.default

    def run(x: Tensor, at: At) -> Tensor:
        h, y = tail(attended(x, at), x, post, None, pre_cross, *numbers)
        h, y = tail(read(y, at), h, post_cross, None, pre_mlp, *numbers)
        return tail(mlp(y), h, post_mlp, None, None, *numbers)[0]

    return run


def _layer(layer: Any, past: Any, index: int, fusable: Callable[[Any], bool]) -> Layer | None:
    cross = getattr(layer, "encoder_attn", None)
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm]
    norms += [] if cross is None else [layer.post_encoder_attention_layernorm]
    numbers, mlp = _numbers(norms, fusable), _mlp(layer.mlp)
    if numbers is None or mlp is None or not quiet(layer):
        return None
    first, post, pre_mlp, post_mlp = (norm.weight for norm in norms[:4])
    cache = past.self_attention_cache if cross is not None else past
    attended = _self(layer.self_attn, kept.layer_of(cache, index), first, numbers)
    if attended is None:
        return None
    tail = _OPS.residual_rms_norm.default

    def plain(x: Tensor, at: At) -> Tensor:
        h, y = tail(attended(x, at), x, post, None, pre_mlp, *numbers)
        return tail(mlp(y), h, post_mlp, None, None, *numbers)[0]

    if cross is None:
        return plain
    read, gate, post_cross = _cross(cross, past, index), layer.encoder_attn_gate, norms[4].weight
    if read is None:
        return None

    def gated(x: Tensor, at: At) -> Tensor:
        h = tail(attended(x, at), x, post, None, None, *numbers)[0]
        h, y = tail(read(h, at), h, post_cross, gate, pre_mlp, *numbers)
        return tail(mlp(y), h, post_mlp, None, None, *numbers)[0]

    return gated
