"""Tiny models with Llama's layers: alone, and Mllama, whose layers between them read pictures."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from models import VOCAB, Family, _causal_inputs, _causal_training, _gemma, _spread
from torch import Tensor, nn


def llama(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    text = {n: v for n, v in _gemma().items() if "sliding" not in n and "softcap" not in n}
    for name in ("query_pre_attn_scalar", "layer_types"):
        del text[name]
    return _spread(tf.LlamaForCausalLM(tf.LlamaConfig(**{**text, **settings})), 0.2)


def mllama(**settings: Any) -> nn.Module:
    """Layers that read images stand second and last; the gates, 0 at first, are open."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    text = {
        **{n: v for n, v in _gemma().items() if "sliding" not in n and "softcap" not in n},
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "rope_parameters": rope,
    }
    for name in ("head_dim", "query_pre_attn_scalar", "layer_types"):
        del text[name]
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
    }  # fmt: skip
    config = tf.MllamaConfig(
        text_config={**text, **settings}, vision_config=vision, image_token_index=VOCAB - 1
    )
    model: Any = _spread(tf.MllamaForConditionalGeneration(config), 0.2)
    open_gates(model)
    return model


def open_gates(model: Any, scale: float = 1.0) -> None:
    """Of Mllama's layers that read images."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("attn_gate", "mlp_gate")):
                p.fill_(scale * (0.9 if "attn_gate" in name else -0.7))


def _with_pictures(inputs: dict[str, Tensor], tiles: list[list[int]]) -> dict[str, Tensor]:
    """Pictures of so many tiles for each text: an image token each among its first tokens, behind
    which the text sees that picture until the next one."""
    ids, batch = inputs["input_ids"].clone(), len(tiles)
    most = max(map(len, tiles))
    pixels = torch.randn(batch, most, 4, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    ratios = torch.zeros(batch, most, dtype=torch.int64)
    there = torch.zeros(batch, most, 4, dtype=torch.int64)
    there[:, :, 0] = 1
    sees = torch.zeros(batch, ids.shape[1], most, 4, dtype=torch.int64)
    for row, counts in enumerate(tiles):
        first = int(inputs["attention_mask"][row].argmax()) + 1
        for place, count in enumerate(counts):
            ids[row, first + place] = VOCAB - 1
            ratios[row, place] = (0, 1, 2, 3, 6)[count]
            there[row, place, :count] = 1
            stop = first + place + 1 if place + 1 < len(counts) else ids.shape[1]
            sees[row, first + place : stop, place, :count] = 1
        for place in range(len(counts), most):
            pixels[row, place] = 0
    return {
        **inputs, "input_ids": ids, "pixel_values": pixels, "aspect_ratio_ids": ratios,
        "aspect_ratio_mask": there, "cross_attention_mask": sees,
    }  # fmt: skip


def _mllama_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Two pictures, of which the text behind the second sees that one; one of two tiles; and one
    that fills all tiles."""
    return _with_pictures(_causal_inputs(model), [[1, 3], [2], [4]])


def _mllama_training(model: nn.Module) -> dict[str, Tensor]:
    """The last text has no picture."""
    batch = _with_pictures(_causal_training(model), [[1, 3], [2], []])
    return {**batch, "labels": batch["labels"].masked_fill(batch["input_ids"] == VOCAB - 1, -100)}


LLAMAS = {
    "llama": Family(llama, _causal_inputs, _causal_training),
    "mllama": Family(mllama, _mllama_inputs, _mllama_training),
}
