"""A decoder layer of each Florenz model, as transformers runs it and on fastvlm's ops.

Both sides have the same parameters. transformers gets a padded batch and its own modules, put
together as arXiv 2503.09443 describes them; fastvlm gets the packed rows of the same batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig, Gemma2Config, T5GemmaModuleConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.bart.modeling_bart import BartDecoderLayer
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2RMSNorm
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaCrossAttention

from benchmarks.cases import Decoder
from benchmarks.traffic.counter import DEVICE
from fastvlm import Layout, ops

ENCODER_WIDTH = 1024  # of Florence-2-large, whose states the Gemma decoders read


@dataclass
class Inputs:
    """Of a training step or of a decoding step.

    Training: h [B, L, d] and states [B, E, de] padded, masks [B, 1, L, L] and [B, 1, L, E], and the
    packed rows and states of the same batch with their layouts.
    Decoding: h [rows, 1, d], caches filled; the packed cross K/V exist once per image.
    """

    h: Tensor
    states: Tensor
    self_mask: Tensor | None
    cross_mask: Tensor | None
    rows: Tensor
    packed_states: Tensor
    own: Layout
    cross: Layout
    cos_sin: tuple[Tensor, Tensor]
    packed_cos_sin: tuple[Tensor, Tensor]
    cache: EncoderDecoderCache | None = None
    own_cache: tuple[Tensor, Tensor] | None = None
    filled: Tensor | None = None
    ancestry: Tensor | None = None
    cross_kv: tuple[Tensor, Tensor] | None = None


class FlorenceLayer(nn.Module):
    """BART's decoder layer: post-norm, erf GELU, dropout 0.1 everywhere."""

    def __init__(self, d: Decoder):
        super().__init__()
        config = BartConfig(
            d_model=d.width, decoder_attention_heads=d.heads, decoder_ffn_dim=d.hidden,
            dropout=0.1, attention_dropout=0.1, activation_dropout=0.1,
            attn_implementation="eager",
        )  # fmt: skip
        self.layer = BartDecoderLayer(config, layer_idx=0)

    def transformers(self, x: Inputs) -> Tensor:
        return self.layer(
            x.h, attention_mask=x.self_mask, encoder_hidden_states=x.states,
            encoder_attention_mask=x.cross_mask, past_key_values=x.cache,
        )  # fmt: skip

    def fastvlm(self, x: Inputs) -> Tensor:
        layer = self.layer
        p = 0.1 if self.training else 0.0

        def tail(branch: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
            return ops.residual_layer_norm(
                branch, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=p
            )

        h = x.rows
        a = layer.self_attn
        q, k, v = (_heads(f(h), a.head_dim) for f in (a.q_proj, a.k_proj, a.v_proj))
        h = tail(a.out_proj(_attend(q, k, v, x, a.scaling, None, p)), h, layer.self_attn_layer_norm)
        a = layer.encoder_attn
        read = _read(_heads(a.q_proj(h), a.head_dim), a, x, a.scaling, None, p)
        h = tail(a.out_proj(read), h, layer.encoder_attn_layer_norm)
        out = ops.gelu_mlp(
            h, layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias, dropout_p=p
        )
        return tail(out, h, layer.final_layer_norm)


class GemmaLayer(nn.Module):
    """Gemma-2's layer with a gated cross-attention between its two branches."""

    def __init__(self, d: Decoder):
        super().__init__()
        sizes = {
            "hidden_size": d.width, "num_attention_heads": d.heads,
            "num_key_value_heads": d.kv_heads, "head_dim": d.head_dim,
            "intermediate_size": d.hidden, "attn_logit_softcapping": d.softcap,
            "query_pre_attn_scalar": 256, "attn_implementation": "eager",
        }  # fmt: skip
        self.layer = Gemma2DecoderLayer(Gemma2Config(num_hidden_layers=2, **sizes), layer_idx=1)
        config = T5GemmaModuleConfig(
            cross_attention_hidden_size=ENCODER_WIDTH, num_hidden_layers=2, **sizes
        )
        self.encoder_attn = T5GemmaCrossAttention(config, layer_idx=0)
        self.encoder_attn_gate = nn.Parameter(torch.zeros(1))
        self.post_encoder_attention_layernorm = Gemma2RMSNorm(d.width)

    def transformers(self, x: Inputs) -> Tensor:
        layer, h = self.layer, x.h
        own = None if x.cache is None else x.cache.self_attention_cache
        y, _ = layer.self_attn(
            layer.input_layernorm(h), x.cos_sin, attention_mask=x.self_mask, past_key_values=own
        )
        h = h + layer.post_attention_layernorm(y)
        y, _ = self.encoder_attn(h, x.cross_mask, x.states, past_key_values=x.cache)
        h = h + torch.tanh(self.encoder_attn_gate) * self.post_encoder_attention_layernorm(y)
        y = layer.mlp(layer.pre_feedforward_layernorm(h))
        return h + layer.post_feedforward_layernorm(y)

    def fastvlm(self, x: Inputs) -> Any:
        layer, h = self.layer, x.rows
        a = layer.self_attn
        # the layer before has normalized what this one reads, and this one does so for the next
        y = x.rows
        q, k = (_heads(f(y), a.head_dim) for f in (a.q_proj, a.k_proj))
        q, k = ops.rope(q, k, *x.packed_cos_sin)
        cap = a.attn_logit_softcapping
        y = _attend(q, k, _heads(a.v_proj(y), a.head_dim), x, a.scaling, cap, 0.0)
        h = ops.residual_rms_norm(a.o_proj(y), h, layer.post_attention_layernorm.weight)
        a = self.encoder_attn
        y = a.o_proj(_read(_heads(a.q_proj(h), a.head_dim), a, x, a.scaling, cap, 0.0))
        h, y = ops.residual_rms_norm(
            y, h, self.post_encoder_attention_layernorm.weight, gate=self.encoder_attn_gate,
            next_weight=layer.pre_feedforward_layernorm.weight,
        )  # fmt: skip
        mlp = layer.mlp
        y = ops.geglu_mlp(y, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        return ops.residual_rms_norm(
            y, h, layer.post_feedforward_layernorm.weight,
            next_weight=layer.input_layernorm.weight,
        )  # fmt: skip


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, x: Inputs, scale: float, cap: float | None, p: float
) -> Tensor:
    """Self-attention of packed rows, or of new tokens against the cache they were written to."""
    if x.own_cache is None:
        out = ops.self_attention(q, k, v, x.own, scale=scale, softcap=cap, dropout_p=p)
        return out.flatten(1)
    keys, values = x.own_cache
    keys[:, -1], values[:, -1] = k, v
    assert x.filled is not None
    return ops.cached_attention(
        q, keys, values, x.filled, ancestry=x.ancestry, scale=scale, softcap=cap
    ).flatten(1)


def _read(q: Tensor, a: Any, x: Inputs, scale: float, cap: float | None, p: float) -> Tensor:
    """Cross-attention to the packed states, or to the K/V that were made from them once."""
    if x.cross_kv is None:
        k, v = (_heads(f(x.packed_states), a.head_dim) for f in (a.k_proj, a.v_proj))
    else:
        k, v = x.cross_kv
    out = ops.cross_attention(q, k, v, x.cross, scale=scale, softcap=cap, dropout_p=p)
    return out.flatten(1)


def layer_of(d: Decoder) -> Any:
    return (GemmaLayer if d.gated else FlorenceLayer)(d)


def states_width(d: Decoder) -> int:
    return ENCODER_WIDTH if d.gated else d.width


def training(d: Decoder, lengths: list[int], keys: list[int], longest: int, most: int) -> Inputs:
    """len(lengths) targets, each with an image of its own, padded to longest and most."""
    batch, width = len(lengths), states_width(d)
    make = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)  # noqa: E731
    grads = {"requires_grad": True}
    tables = [make(1, longest, d.head_dim) for _ in range(2)]
    packed = [make(sum(lengths), d.head_dim) for _ in range(2)]
    return Inputs(
        h=make(batch, longest, d.width).requires_grad_(**grads),
        states=make(batch, most, width).requires_grad_(**grads),
        self_mask=make(batch, 1, longest, longest),
        cross_mask=make(batch, 1, longest, most),
        rows=make(sum(lengths), d.width).requires_grad_(**grads),
        packed_states=make(sum(keys), width).requires_grad_(**grads),
        own=Layout.from_lengths(lengths).to(DEVICE),
        cross=Layout.from_lengths(lengths, keys, list(range(batch))).to(DEVICE),
        cos_sin=(tables[0], tables[1]),
        packed_cos_sin=(packed[0], packed[1]),
    )


def decoding(d: Decoder, images: int, beams: int, keys: int, filled: int) -> Inputs:
    """One step of images * beams rows, the filled-th token of each."""
    rows, width = images * beams, states_width(d)
    make = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)  # noqa: E731
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for index in (0, 1):
        own = [make(rows, d.kv_heads, filled - 1, d.head_dim) for _ in range(2)]
        cache.self_attention_cache.update(*own, index)
        cross = [make(rows, d.kv_heads, keys, d.head_dim) for _ in range(2)]
        cache.cross_attention_cache.update(*cross, index)
        cache.is_updated[index] = True
    tables = [make(1, 1, d.head_dim) for _ in range(2)]
    packed = [make(rows, d.head_dim) for _ in range(2)]
    own_cache = [make(rows, filled, d.kv_heads, d.head_dim) for _ in range(2)]
    cross_kv = [make(images * keys, d.kv_heads, d.head_dim) for _ in range(2)]
    return Inputs(
        h=make(rows, 1, d.width),
        states=make(rows, keys, width),
        self_mask=None,
        cross_mask=make(rows, 1, 1, keys),
        rows=make(rows, d.width),
        packed_states=make(images * keys, width),
        own=Layout.from_lengths([1] * rows).to(DEVICE),
        cross=Layout.for_beams(images, beams, [keys] * images).to(DEVICE),
        cos_sin=(tables[0], tables[1]),
        packed_cos_sin=(packed[0], packed[1]),
        cache=cache,
        own_cache=(own_cache[0], own_cache[1]),
        filled=torch.empty(rows, dtype=torch.int32, device=DEVICE),
        ancestry=torch.empty(rows, filled, dtype=torch.int32, device=DEVICE),
        cross_kv=(cross_kv[0], cross_kv[1]),
    )
