"""A decoding step without its modules: the ops of a stack, one after the other.

A step of a few rows computes for milliseconds, and two hundred modules with their hooks, checks and
caches take half as long again. Where nothing but the usual is there, a stack's step is planned once
for a cache, weights looked up, and then calls the ops' schemas alone. What the plan is of is looked
at when it is made: a hook or an adapter that comes while a cache is being filled is seen by the
next.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastvlm.nn.linear import is_plain
from fastvlm.ops.attention import arguments_of
from fastvlm.patching.weights import is_low_precision

Rows = Callable[[Tensor], Tensor]


class At(NamedTuple):
    """What all layers of a step share.

    seen: int32 [R, T], -1 where a position is padding, or None. where: `arguments_of` the layout of
    cross-attention. rotation: cos and sin of RoPE, [R, head_dim] each.
    """

    seen: Tensor | None
    where: tuple[Any, ...]
    rotation: tuple[Tensor, Tensor] | tuple[()]


# what a layer hands to the next: [R, d], or the stream and what its first norm makes of it
Layer = Callable[[Any, At], Any]
_OPS = torch.ops.fastvlm


def quiet(*modules: Any) -> bool:
    """Whether calling these would run nothing but their forward."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return not any(
        "forward" in vars(module) or any(getattr(module, name) for name in hooks)
        for module in modules
    )


def product(module: Any) -> Rows | None:
    """rows [R, K] -> [R, N] of a linear layer, or None where it must be called."""
    if is_plain(module):
        linear, weight, bias = _OPS.linear.default, module.weight, module.bias
        return lambda x: linear(x, weight, bias)
    if is_low_precision(module) and type(module.weight) is nn.Parameter and quiet(module):
        from fastvlm.nn.low_precision import stored_copy

        if module.weight.is_meta or module.weight.is_inference():
            return None
        narrow, bias = _OPS.low_precision_linear.default, module.bias
        stored, scale = stored_copy(module, module.storage)
        return lambda x: narrow(x, stored, scale, bias)
    return None


def products(*modules: Any) -> list[Rows] | None:
    """All of them, or None."""
    found = [product(module) for module in modules]
    return None if any(p is None for p in found) else found  # type: ignore[return-value]


class SelfReads:
    """The new token of each row against the cache of its layer."""

    def __init__(self, attention: Any, layer: Any, window: int | None, softcap: float | None):
        self.layer, self.head_dim = layer, attention.head_dim
        # in the schemas 0 stands for no window and for no cap
        self.settings = window or 0, attention.scaling, softcap or 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """q [R, H, D], k, v [R, Hkv, D], seen: where padding is -1 -> [R, H * D]."""
        layer = self.layer
        keys, values = layer.append(k.unsqueeze(1), v.unsqueeze(1))
        ancestry = layer.rows.ancestry
        if seen is not None:
            ancestry = seen if ancestry is None else torch.where(seen < 0, seen, ancestry)
        lengths = layer.rows.lengths
        out: Tensor = _OPS.cached_attention.default(
            q, keys, values, lengths, ancestry, *self.settings
        )
        return out.flatten(1)


class CrossReads:
    """The new token of each row against the image of its prompt."""

    def __init__(self, attention: Any, layer: Any, softcap: float | None):
        self.k, self.v = layer.packed
        self.head_dim = attention.head_dim
        self.settings = False, 0, attention.scaling, softcap or 0.0, 0.0

    def __call__(self, q: Tensor, where: tuple[Any, ...]) -> Tensor:
        """q [R, H, D], where: `arguments_of` the layout -> [R, H * D]."""
        out: Tensor = _OPS.cross_attention.default(q, self.k, self.v, *where, *self.settings)[0]
        return out.flatten(1)


class Plan:
    """The step of one stack for one cache; layers: a function for each.

    begin: the embedded tokens -> what the first layer takes. end: what the last gives -> [R, d].
    """

    def __init__(
        self,
        stack: Any,
        layers: list[Layer],
        begin: Callable[[Tensor], Any] = lambda x: x,
        end: Callable[[Any], Tensor] = lambda x: x,
    ):
        self.stack, self.layers = weakref.ref(stack), layers
        self.begin, self.end = begin, end

    def __call__(self, x: Tensor, layouts: Any, rotation: Any) -> Tensor:
        """x [R, d], the embedded tokens -> [R, d], the stack's last states."""
        where = () if layouts.cross is None else arguments_of(layouts.cross)
        at = At(layouts.visible, where, rotation)
        state = self.begin(x)
        for layer in self.layers:
            state = layer(state, at)
        return self.end(state)


# beside the caches, not in them: a cache is copied, saved and kept
PLANS: WeakKeyDictionary[Any, dict[int, Plan | None]] = WeakKeyDictionary()


def usual(stack: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for nothing but the next states."""
    asks = ("output_attentions", "output_hidden_states", "return_dict")
    if any(kwargs.get(name) is not None for name in asks) or torch.compiler.is_compiling():
        return False
    config = stack.config
    if config.output_attentions or config.output_hidden_states:
        return False
    return not (stack.training or torch.is_grad_enabled()) and quiet(stack)
