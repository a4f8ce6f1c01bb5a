"""Tiny models with Gemma-3's attention: T5Gemma 2, with images and without, and Gemma-3 alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from models import (
    EOS,
    PAD,
    VOCAB,
    Family,
    _causal_inputs,
    _causal_training,
    _pad,
    _seq2seq,
    _spread,
    _tokens,
    _with_labels,
)
from torch import Tensor, nn

IMAGE, END_OF_IMAGE = VOCAB - 1, VOCAB - 2
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _sizes(**settings: Any) -> dict[str, Any]:
    """A window shorter than the texts, even: it reaches further behind a row than before it."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": 0,
        **settings,
    }


def t5gemma2(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = tf.T5Gemma2Config(
        encoder={
            "text_config": _sizes(**settings),
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "eoi_token_index": END_OF_IMAGE,
        },
        decoder=_sizes(**settings),
        image_token_index=IMAGE,
        dropout_rate=0.0,
        attention_dropout=0.0,
    )
    return _spread(tf.T5Gemma2ForConditionalGeneration(config), 0.2)


def gemma3(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = tf.Gemma3TextConfig(**_sizes(**settings))
    return _spread(tf.Gemma3ForCausalLM(config), 0.2)


def pictures(model: nn.Module) -> dict[str, Tensor]:
    """Three rows with an image of four tokens, its end, and a text of its own length."""
    text, mask = _pad(_tokens(3, 7), [7, 2, 4], left=False)
    image = torch.full((3, 5), IMAGE)
    image[:, 4] = END_OF_IMAGE
    return {
        "input_ids": torch.cat([image, text], 1),
        "attention_mask": torch.cat([torch.ones_like(image), mask], 1),
        "pixel_values": torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(2)),
    }


GEMMA3 = {
    "t5gemma2": Family(t5gemma2, pictures, lambda model: _with_labels(pictures(model))),
    "t5gemma2-text": _seq2seq(t5gemma2),
    "gemma3": Family(gemma3, _causal_inputs, _causal_training),
}
