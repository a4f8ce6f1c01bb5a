"""One attention by its spec: training and prefill on packed rows, or a step against a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from fastvlm import ops
from fastvlm.compat import attentions, hf
from fastvlm.decoding import cache as cross_cache
from fastvlm.decoding import rows as beam_cache
from fastvlm.layout import Layout
from fastvlm.models.spec import Attention
from fastvlm.nn.wrapped import owns
from fastvlm.run import static
from fastvlm.run.layouts import Layouts, taken
from fastvlm.run.mixin import Mixin, by_name

_SDPA_LEAVES_OUT_SOFTCAP = attentions.sdpa_leaves_out_softcap()


def scale_of(module: Any, spec: Attention) -> float:
    """What the scores of an attention module are multiplied with."""
    if spec.scale is None:
        return float(module.head_dim) ** -0.5
    scale: float = getattr(module, spec.scale)
    return scale


def softcap_of(module: Any, spec: Attention) -> float | None:
    """The cap on the scores of an attention module, where transformers computes it."""
    cap: float | None = None if spec.softcap is None else getattr(module, spec.softcap)
    return None if cap is None or _leaves_out_softcap(module) else cap


def window_of(module: Any, spec: Attention) -> int | tuple[int, int] | None:
    """The positions that a row sees, its own included, as `ops.self_attention` takes them."""
    window: int | None = None if spec.window is None else getattr(module, spec.window)
    if window is None or is_causal(module, spec):
        return window
    if spec.splits_window:
        return (window + 1) // 2 - 1, window // 2
    return window + 1  # transformers' bidirectional window includes its far end


def is_causal(module: Any, spec: Attention) -> bool:
    """Whether rows that read themselves see only those before them."""
    return spec.causal is None or bool(getattr(module, spec.causal))


def _leaves_out_softcap(module: Any) -> bool:
    return _SDPA_LEAVES_OUT_SOFTCAP and attentions.attention_of(module.config) == "sdpa"


def left_out_softcaps(model: torch.nn.Module) -> list[str]:
    """What a reader of the report should know of attention whose config has a cap in vain."""
    capped = (m for m in model.modules() if getattr(m, "attn_logit_softcapping", None) is not None)
    if not any(map(_leaves_out_softcap, capped)):
        return []
    return [
        "transformers' sdpa leaves out attn_logit_softcapping, and so does fastvlm then: "
        "model.set_attn_implementation('eager') computes with it"
    ]


class PatchedAttention(Mixin):
    """Self- or cross-attention; transformers' own forward where no layouts were handed down."""

    spec: Attention

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        spec, layouts = self.spec, taken(kwargs, self)
        given = by_name(spec.arguments, args, kwargs)
        states = None if spec.states is None else given.get(spec.states)
        mask, cache = given.get(spec.mask), hf.cache_in(given)
        crosses = states is not None or (spec.keeps_states and cache is not None)
        fuses = layouts is not None
        if layouts is not None and (spec.merged or not crosses):
            fuses = not spec.cross and layouts.fuses(mask, hidden_states)
        if layouts is None or not fuses:
            out: tuple[Any, ...] = super().forward(hidden_states, *args, **kwargs)
            return out
        bias = None
        if crosses and not spec.merged:
            q = self._heads(self.q_proj(hidden_states))
            if spec.norms is not None:
                q = getattr(self, spec.norms[0])(q)
            y = self._cross(q, states, layouts, cache)
        else:
            q, k, v = self._queries_keys_values(hidden_states)
            if spec.norms is not None:
                q, k = (getattr(self, norm)(x) for norm, x in zip(spec.norms, (q, k)))
            if spec.rotary:
                q, k = _rotated(q, k, *given["position_embeddings"])
            bias = self._position_bias(given)
            if spec.merged and states is not None:
                y = self._merged(q, k, v, states, layouts, cache)
            else:
                y = self._self(q, k, v, layouts, cache, mask, bias)
        y = y if spec.out is None else getattr(self, spec.out)(y)
        if spec.out_dropout is not None:
            y = getattr(self, spec.out_dropout)(y)
        return (y, bias, None) if spec.shares_bias or spec.merged else (y, None)

    def _position_bias(self, given: dict[str, Any]) -> Tensor | None:
        """[H, 2D + 1], as `fastvlm.ops.self_attention` takes it: another's, or our own."""
        shared: Tensor | None = given.get("position_bias")
        table = self.spec.bias
        if table is None or shared is not None or not owns(self, table):
            return shared
        return hf.bias_of_distances(self)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _queries_keys_values(self, x: Tensor) -> list[Tensor]:
        """Of rows that read themselves, x [..., d] -> [..., heads, D] each."""
        fused = self.spec.fused
        if fused is not None:
            return [self._heads(part) for part in getattr(self, fused)(x).chunk(3, -1)]
        return [self._heads(part(x)) for part in (self.q_proj, self.k_proj, self.v_proj)]

    def keys_values(self, states: Tensor) -> list[Tensor]:
        """Of the encoder's states [..., d] -> [..., heads, D] each."""
        fused, norms = self.spec.fused, self.spec.norms
        if fused is not None:
            return [self._heads(part) for part in getattr(self, fused)(states).chunk(2, -1)]
        k, v = (self._heads(part(states)) for part in (self.k_proj, self.v_proj))
        return [k if norms is None else getattr(self, norms[1])(k), v]

    def _dropout(self) -> float:
        dropout: Any = getattr(self, self.spec.dropout)
        p: Any = dropout.p if isinstance(dropout, torch.nn.Module) else dropout
        return float(p) if self.training else 0.0

    def _self(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layouts: Layouts,
        cache: Any,
        mask: Any,
        bias: Tensor | None,
    ) -> Tensor:
        """q [B, L, H, D], k, v [B, L, Hkv, D] -> [B, L, H * D]; appends to a cache.

        In a packed stack B is 1 and L all tokens of the batch. mask: of a static cache's step.
        """
        if layouts.static is not None:
            scale, softcap = scale_of(self, self.spec), softcap_of(self, self.spec)
            cache = getattr(cache, "self_attention_cache", cache)
            index = self.layer_idx
            return static.self_attend(
                *(q, k, v, mask, cache, index), scale=scale, softcap=softcap, position_bias=bias
            )
        out: Tensor = self._own_rows(q, k, v, layouts, cache, position_bias=bias).flatten(1)
        return out.unsqueeze(1) if layouts.rows is None else layouts.unpack(out)

    def _merged(
        self, q: Tensor, k: Tensor, v: Tensor, states: Tensor, layouts: Layouts, cache: Any
    ) -> Tensor:
        """As `_self`, the keys of the encoder's states among those of the rows."""
        own = self._own_rows(q, k, v, layouts, cache, return_lse=True)
        other = self._images_rows(q, states, layouts, cache, return_lse=True)
        return layouts.unpack(ops.merge_attention(*own, *other).flatten(1))

    def _own_rows(
        self, q: Tensor, k: Tensor, v: Tensor, layouts: Layouts, cache: Any, **more: Any
    ) -> Any:
        """Of rows that read themselves, packed; more: of what the ops take."""
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        more |= {"scale": scale_of(self, self.spec), "softcap": softcap_of(self, self.spec)}
        window = window_of(self, self.spec)
        if cache is not None:
            layer = beam_cache.layer_of(cache, self.layer_idx)
            keys, values = layer.append(k, v)
            if layouts.rows is None:
                lengths = layer.rows.lengths
                assert lengths is not None
                assert not isinstance(window, tuple)  # of rows that see what comes
                moved = layouts.ancestry(layer.rows.ancestry)
                return ops.cached_attention(
                    q[:, 0], keys, values, lengths, ancestry=moved, window=window, **more
                )
        rows = layouts.rows
        assert rows is not None  # a decoding step always has a cache
        return ops.self_attention(
            layouts.pack(q),
            layouts.pack(k),
            layouts.pack(v),
            rows,
            causal=is_causal(self, self.spec),
            window=window,
            dropout_p=self._dropout(),
            **more,
        )

    def _cross(self, q: Tensor, states: Tensor | None, layouts: Layouts, cache: Any) -> Tensor:
        """q [R, L, H, D] against the encoder's states [I, S, d] -> [R, L, H * D].

        In a packed stack R and I are 1, L and S all tokens.
        """
        if layouts.static is not None:
            assert states is not None
            scale, softcap = scale_of(self, self.spec), softcap_of(self, self.spec)
            return static.cross_attend(
                self, q, states, layouts.static, cache, scale=scale, softcap=softcap
            )
        return layouts.unpack(self._images_rows(q, states, layouts, cache).flatten(1))

    def _images_rows(
        self,
        q: Tensor,
        states: Tensor | None,
        layouts: Layouts,
        cache: Any,
        return_lse: bool = False,
    ) -> Any:
        """Of rows that read the encoder's states, packed."""
        layout = layouts.cross
        assert layout is not None
        return ops.cross_attention(
            layouts.pack(q),
            *self._read(states, layouts, layout, cache),
            layout,
            scale=scale_of(self, self.spec),
            softcap=softcap_of(self, self.spec),
            dropout_p=self._dropout(),
            return_lse=return_lse,
        )

    def _read(
        self, states: Tensor | None, layouts: Layouts, layout: Layout, cache: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values that the rows see."""
        layer, seen = cross_cache.cross_layer(cache, self.layer_idx), layouts.seen
        known = None if layer is None else layer.packed
        if known is not None and (states is None or not self.spec.keeps_states):
            k, v = known
            if layer is not None and layouts.rows is None and layouts.fused_self:
                return layer.at_steps() or known
        else:
            assert states is not None
            k, v = self.keys_values(layouts.packed_states(states))
            if known is not None:  # of another image, behind those that are there
                count = (layout if seen is None else seen.whole).num_images
                k, v = (_behind(old, new, count) for old, new in zip(known, (k, v)))
            if layer is not None:
                k, v = k.contiguous(), v.contiguous()  # each is read by itself, in every step
                layer.fill(k, v, layout if seen is None else seen.whole, self)
                if isinstance(cache, EncoderDecoderCache):
                    hf.set_cross_filled(cache, self.layer_idx)
        if seen is not None and seen.keys is not None:
            k, v = k.index_select(0, seen.keys), v.index_select(0, seen.keys)
        return k, v


def _behind(old: Tensor, new: Tensor, images: int) -> Tensor:
    """Keys or values [images * K, ...] of each image, and behind them more."""
    parts = (x.unflatten(0, (images, -1)) for x in (old, new))
    return torch.cat(tuple(parts), 1).flatten(0, 1)


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, L, H, D], k [B, L, Hkv, D]; cos, sin [1 or B, L, D]."""
    grid = q.shape[:2]
    tables = (t.expand(grid[0], -1, -1).flatten(0, 1) for t in (cos, sin))
    q, k = ops.rope(q.flatten(0, 1), k.flatten(0, 1), *tables)
    return q.unflatten(0, grid), k.unflatten(0, grid)
