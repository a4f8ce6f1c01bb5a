"""A decoder layer of each Florenz model, as transformers runs it and on fastvlm's ops.

All sides have the same parameters. transformers gets a padded batch and its own modules, put
together as arXiv 2503.09443 describes them; fastvlm gets the packed rows of the same batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig, Gemma2Config, T5GemmaModuleConfig
from transformers.models.bart.modeling_bart import BartDecoderLayer
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaCrossAttention

from benchmarks.cases import Decoder
from benchmarks.traffic.inputs import ENCODER_WIDTH, Packed, Padded
from fastvlm import ops


class FlorenceLayer(nn.Module):
    """BART's decoder layer: post-norm, erf GELU, dropout 0.1 everywhere."""

    def __init__(self, d: Decoder, attention: str = "eager"):
        super().__init__()
        config = BartConfig(
            d_model=d.width, decoder_attention_heads=d.heads, decoder_ffn_dim=d.hidden,
            dropout=0.1, attention_dropout=0.1, activation_dropout=0.1,
            attn_implementation=attention,
        )  # fmt: skip
        self.layer = BartDecoderLayer(config, layer_idx=0)

    def transformers(self, x: Padded) -> Tensor:
        return self.layer(
            x.h, attention_mask=x.self_mask, encoder_hidden_states=x.states,
            encoder_attention_mask=x.cross_mask, past_key_values=x.cache,
        )  # fmt: skip

    def fastvlm(self, x: Packed) -> Tensor:
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

    def __init__(self, d: Decoder, attention: str = "eager"):
        """attention: eager, whatever is asked for: sdpa knows no softcap."""
        super().__init__()
        sizes = {
            "hidden_size": d.width, "num_attention_heads": d.heads,
            "num_key_value_heads": d.kv_heads, "head_dim": d.head_dim,
            "intermediate_size": d.hidden, "attn_logit_softcapping": d.softcap,
            "query_pre_attn_scalar": 256, "attn_implementation": "eager",
        }  # fmt: skip
        # looked up in their module, where Liger-Kernel puts its own
        self.layer = modeling_gemma2.Gemma2DecoderLayer(
            Gemma2Config(num_hidden_layers=2, **sizes), layer_idx=1
        )
        config = T5GemmaModuleConfig(
            cross_attention_hidden_size=ENCODER_WIDTH, num_hidden_layers=2, **sizes
        )
        self.encoder_attn = T5GemmaCrossAttention(config, layer_idx=0)
        self.encoder_attn_gate = nn.Parameter(torch.zeros(1))
        self.post_encoder_attention_layernorm = modeling_gemma2.Gemma2RMSNorm(d.width)

    def transformers(self, x: Padded) -> Tensor:
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

    def fastvlm(self, x: Packed) -> Any:
        layer, h = self.layer, x.rows
        a = layer.self_attn
        # the layer before has normalized what this one reads, and this one does so for the next
        y = x.rows
        q, k = (_heads(f(y), a.head_dim) for f in (a.q_proj, a.k_proj))
        q, k = ops.rope(q, k, *x.cos_sin)
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
    q: Tensor, k: Tensor, v: Tensor, x: Packed, scale: float, cap: float | None, p: float
) -> Tensor:
    """Self-attention of packed rows, or of new tokens against the cache they were written to."""
    if x.cache is None:
        out = ops.self_attention(q, k, v, x.own, scale=scale, softcap=cap, dropout_p=p)
        return out.flatten(1)
    keys, values = x.cache
    keys[:, -1], values[:, -1] = k, v
    assert x.filled is not None
    return ops.cached_attention(
        q, keys, values, x.filled, ancestry=x.ancestry, scale=scale, softcap=cap
    ).flatten(1)


def _read(q: Tensor, a: Any, x: Packed, scale: float, cap: float | None, p: float) -> Tensor:
    """Cross-attention to the packed states, or to the K/V that were made from them once."""
    if x.cross_kv is None:
        k, v = (_heads(f(x.states), a.head_dim) for f in (a.k_proj, a.v_proj))
    else:
        k, v = x.cross_kv
    out = ops.cross_attention(q, k, v, x.cross, scale=scale, softcap=cap, dropout_p=p)
    return out.flatten(1)


def layer_of(d: Decoder, attention: str = "eager") -> Any:
    return (GemmaLayer if d.gated else FlorenceLayer)(d, attention)
