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
# what layers hand on: h [R, d], and RMS(h) with the weight of the norm that comes next
Stream = tuple[Tensor, Tensor]


def plan(stack: Any, past: Any, layer_class: type, fusable: Callable[[Any], bool]) -> Plan | None:
    """The step of a patched stack for its prefilled cache; None where modules must be called.

    A layer's last norm also makes what the first norm after it would, the next layer's or the
    stack's: one launch for two.
    """
    parts = stack.embed_tokens, stack.rotary_emb, stack.norm
    if factor_of(stack.embed_tokens) is None or not quiet(*parts):
        return None
    if not all(isinstance(layer, layer_class) for layer in stack.layers):
        return None
    norms = [_norms(layer) for layer in stack.layers]
    numbers = _numbers([*(norm for found in norms for norm in found), stack.norm], fusable)
    if numbers is None:
        return None
    firsts = [*(found[0].weight for found in norms), stack.norm.weight]
    layers: list[Layer] = []
    for index, layer in enumerate(stack.layers):
        make = _t5_layer if hasattr(layer, "cross_attn") else _layer
        weights = [norm.weight for norm in norms[index][1:]]
        made = make(layer, past, index, (*weights, firsts[index + 1]), numbers)
        if made is None:
            return None
        layers.append(made)
    rms, first = _OPS.rms_norm.default, firsts[0]
    return Plan(stack, layers, lambda x: (x, rms(x, first, *numbers)), lambda state: state[1])


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


def _self(own: Any, layer: Any) -> Callable[[Tensor, At], Tensor] | None:
    """x -> SelfAttn(x), appending to layer."""
    linear = products(own.q_proj, own.k_proj, own.v_proj, own.o_proj)
    if linear is None or not quiet(own):
        return None
    reads = SelfReads(own, layer, own.sliding_window, own.attn_logit_softcapping)
    rope, shape = _OPS.rope.default, (-1, own.head_dim)
    q, k, v, out = linear

    def run(y: Tensor, at: At) -> Tensor:
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


def _t5_layer(
    layer: Any, past: Any, index: int, norms: tuple[Tensor, ...], numbers: tuple[float, float]
) -> Layer | None:
    """norms: the weights behind the first, and that of the norm after the layer."""
    post, pre_cross, post_cross, pre_mlp, post_mlp, following = norms
    mlp = _mlp(layer.mlp)
    attended = _self(layer.self_attn, kept.layer_of(past.self_attention_cache, index))
    read = _cross(layer.cross_attn, past, index)
    if mlp is None or attended is None or read is None or not quiet(layer):
        return None
    tail = _OPS.residual_rms_norm.default

    def run(state: Stream, at: At) -> Stream:
        h, y = state
        h, y = tail(attended(y, at), h, post, None, pre_cross, *numbers)
        h, y = tail(read(y, at), h, post_cross, None, pre_mlp, *numbers)
        return tail(mlp(y), h, post_mlp, None, following, *numbers)

    return run


def _layer(
    layer: Any, past: Any, index: int, norms: tuple[Tensor, ...], numbers: tuple[float, float]
) -> Layer | None:
    """norms: as in `_t5_layer`; three of them are those of the MLP and of what follows."""
    cross, mlp = getattr(layer, "encoder_attn", None), _mlp(layer.mlp)
    post, *of_cross, pre_mlp, post_mlp, following = norms
    cache = past.self_attention_cache if cross is not None else past
    attended = _self(layer.self_attn, kept.layer_of(cache, index))
    if mlp is None or attended is None or not quiet(layer):
        return None
    tail = _OPS.residual_rms_norm.default

    def plain(state: Stream, at: At) -> Stream:
        h, y = state
        h, y = tail(attended(y, at), h, post, None, pre_mlp, *numbers)
        return tail(mlp(y), h, post_mlp, None, following, *numbers)

    if cross is None:
        return plain
    read, gate, (post_cross,) = _cross(cross, past, index), layer.encoder_attn_gate, of_cross
    if read is None:
        return None

    def gated(state: Stream, at: At) -> Stream:
        h, y = state
        h = tail(attended(y, at), h, post, None, None, *numbers)[0]
        h, y = tail(read(h, at), h, post_cross, gate, pre_mlp, *numbers)
        return tail(mlp(y), h, post_mlp, None, following, *numbers)

    return gated
