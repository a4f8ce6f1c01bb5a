"""A tiny Pix2Struct: flattened patches of pictures, and a decoder that begins with a pad.

As in `models`: weights spread wide, so that something differs.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from models import EOS, PAD, VOCAB, Family, _spread, _with_labels
from torch import Tensor, nn

PATCHES = 7


def text_sizes(**settings: Any) -> dict[str, Any]:
    """Distances end within a short text, as T5's in `models`."""
    ends = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 0}
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    return {
        **ends,
        **sizes,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 9,
        "decoder_start_token_id": PAD,
        "use_cache": True,
        **settings,
    }


def pix2struct(tie_word_embeddings: bool = False, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "patch_embed_hidden_size": 12,
        "d_ff": 48,
        "d_kv": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "seq_len": 16,
    }
    config = tf.Pix2StructConfig(
        text_config=text_sizes(**settings),
        vision_config=vision,
        tie_word_embeddings=tie_word_embeddings,
    )
    model = _spread(tf.Pix2StructForConditionalGeneration(config), 0.15)
    with torch.no_grad():  # scores have no scale: published queries are as small
        for name, weight in model.named_parameters():
            if name.endswith("query.weight"):
                weight.mul_(8**-0.5)
    return model


def patches() -> tuple[Tensor, Tensor]:
    """Three pictures of 7, 4 and 6 patches; each begins with its row and its column."""
    x = torch.randn(3, PATCHES, 14, generator=torch.Generator().manual_seed(2))
    places = torch.arange(PATCHES)
    x[:, :, 0], x[:, :, 1] = places // 3 + 1, places % 3 + 1
    mask = (places < torch.tensor([[7], [4], [6]])).float()
    return x * mask.unsqueeze(-1), mask


def pix2struct_inputs(model: nn.Module) -> dict[str, Tensor]:
    found, mask = patches()
    return {"flattened_patches": found, "attention_mask": mask}


PIX2STRUCT = {
    "pix2struct": Family(
        pix2struct, pix2struct_inputs, lambda m: _with_labels(pix2struct_inputs(m))
    ),
}
