"""One layer by its spec on the rows of a batch: training, prefill, and steps that call modules.

Its attentions, norms and MLP stay modules that are called, but for what one op does together and
nobody listens to.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from fastvlm import ops
from fastvlm.compat import hf
from fastvlm.models.spec import Layer, Mlp, Residual
from fastvlm.models.structure import part_of
from fastvlm.nn.linear import is_plain, is_watched
from fastvlm.nn.mlp import gelu_mlp, is_known
from fastvlm.nn.norm import is_plain_rms_norm
from fastvlm.run.layer import run_layer
from fastvlm.run.layouts import entered, received
from fastvlm.run.mixin import Mixin, by_name

# what a cache is called: by this transformers, and in the specs
_CACHES = (hf.cache_argument(), "past_key_values")
_STATES_MASK = "encoder_attention_mask"
_BIAS = "position_bias"
# what the attention of a layer's own rows gets besides; the rest goes to each of its attentions
_OF_ROWS = ("position_embeddings", "position_ids", _BIAS)


class PatchedLayer(Mixin):
    """A layer that is run by its spec."""

    spec: Layer
    runs_packed = True

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        spec = self.spec
        given = received(by_name(spec.arguments, args, kwargs), spec.handed)
        layouts = entered(given, self)
        if layouts is None and spec.bypasses:  # somebody may look at what is not called here
            return super().forward(hidden_states, *args, **kwargs)
        # a stack that adds positions by column leaves it to its first layer to pack
        h = hidden_states if layouts is None else layouts.enter(hidden_states)
        reads = given.get(spec.given) is not None
        residuals = [r for r in spec.residuals if reads or not r.optional]
        modules = _Modules(self, given)
        h, _ = run_layer(modules, self, residuals, h)
        if spec.clamps in ("always", "overflow"):
            h = _finite(h, spec.clamps)
        h = h if layouts is None else layouts.leave(h, self)
        if spec.shares_bias:
            return (h, modules.position_bias, *(None,) * (spec.results - 2))
        return (h,) if spec.in_tuple else h


def _finite(h: Tensor, when: str) -> Tensor:
    """As transformers does, but decided on the device: no wait for it."""
    if h.dtype != torch.float16:
        return h
    limit = torch.finfo(torch.float16).max - 1000
    clamped = h.clamp(-limit, limit)
    if when == "always":
        return clamped
    left = ~torch.isfinite(h) if when == "overflow" else torch.isinf(h)
    return torch.where(left.any(), clamped, h)


class _Modules:
    """A `fastvlm.run.layer.Runner` that calls a layer's modules. given: what the layer was."""

    def __init__(self, layer: Any, given: dict[str, Any]) -> None:
        spec: Layer = layer.spec
        self.layer, self.given, self.spec = layer, given, spec
        self.cache = hf.cache_in(given)
        self.position_bias = given.get(_BIAS)
        self.shared = {
            name: value
            for name, value in given.items()
            if name not in _CACHES and (name not in spec.arguments or name in spec.hands)
        }

    def norm(self, x: Tensor, norm: Any) -> Tensor:
        y: Tensor = norm(x)
        return y

    def branch(self, x: Tensor, residual: Residual) -> Tensor:
        layer = self.layer
        if isinstance(residual.branch, Mlp):
            return _mlp(x, layer, residual.branch)
        part = part_of(layer, residual.branch)
        if residual.reads == "mlp":
            y: Tensor = part(x)
            return y
        arguments = self._arguments(residual)
        out = part(hidden_states=x, **arguments) if self.spec.named else part(x, **arguments)
        attended: Tensor = out[0]
        if residual.project is not None:
            attended = part_of(layer, residual.project)(attended)
        if residual.reads == "self" and self.spec.shares_bias:
            self.position_bias = out[1]
        return attended

    def _arguments(self, residual: Residual) -> dict[str, Any]:
        """What an attention is called with, besides the rows."""
        given, spec, cache = self.given, self.spec, self.cache
        arguments = dict(self.shared)
        if residual.reads in ("cross", "merged"):
            arguments[spec.states] = given.get(spec.given)
        if residual.reads == "cross":
            arguments[spec.cross_mask or spec.mask] = given.get(_STATES_MASK)
            arguments[_CACHES[0]] = cache
            return arguments
        mask = spec.mask if spec.mask in spec.arguments else "attention_mask"
        arguments[spec.mask] = given.get(mask)
        for name in _OF_ROWS:
            if name in spec.arguments:
                arguments[name] = given.get(name)
        if "past_key_values" in spec.arguments:
            if spec.splits_cache and isinstance(cache, EncoderDecoderCache):
                cache = cache.self_attention_cache
            arguments[_CACHES[0]] = cache
        return arguments

    def join(
        self, x: Tensor, h: Tensor, residual: Residual, following: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer = self.layer
        after: Any = None if residual.after is None else getattr(layer, residual.after)
        norm: Any = None if residual.norm is None else part_of(layer, residual.norm)
        gate = None if residual.gate is None else getattr(layer, residual.gate)
        factors = None if residual.factors is None else self.given.get(residual.factors)
        x = x if factors is None else factors[:, 0] * x
        path = residual.dropout or self.spec.dropout
        dropout = None if path is None else part_of(layer, path)
        watched, p = False, dropout
        if isinstance(dropout, nn.Module):
            watched, p = is_watched(dropout), dropout.p
        p = p if p is not None and layer.training else 0.0
        if not watched:
            if norm is not None and after is None and gate is None and _is_layer_norm(norm):
                tail = ops.residual_layer_norm
                return tail(x, h, norm.weight, norm.bias, eps=norm.eps, dropout_p=p), None
            if after is not None and norm is None and p == 0 and _fuse(after, following):
                out: Any = ops.residual_rms_norm(
                    x,
                    h,
                    after.weight,
                    gate=gate,
                    next_weight=None if following is None else following.weight,
                    eps=after.eps,
                    offset=after.offset,
                )
                return (out, None) if following is None else out
        x = x if after is None else after(x)
        x = x if gate is None else torch.tanh(gate) * x
        if isinstance(dropout, nn.Module):
            x = dropout(x)
        elif p > 0:
            x = F.dropout(x, p)
        h = h + x
        if self.spec.clamps == "infinite":
            h = _finite(h, "infinite")
        return (h if norm is None else norm(h)), None


def _is_layer_norm(norm: Any) -> bool:
    return is_plain(norm, nn.LayerNorm) and norm.bias is not None


def _fuse(after: Any, following: Any) -> bool:
    """Whether one op may compute a norm, and the one behind it if there is one."""
    if not is_plain_rms_norm(after):
        return False
    if following is None:
        return True
    same = is_plain_rms_norm(following) and following.eps == after.eps
    return same and bool(following.offset == after.offset)


def _mlp(x: Tensor, layer: Any, spec: Mlp) -> Tensor:
    p = getattr(layer, spec.dropout) if layer.training and spec.dropout is not None else 0.0
    act, up, down = (part_of(layer, name) for name in (spec.act, spec.up, spec.down))
    known = is_known(act, spec.evaluated)
    return gelu_mlp(x, up, down, spec.activation, p, None if known else act)
