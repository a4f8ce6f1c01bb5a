"""Tiny models with BERT's layers, behind an encoder of words (BERT, RoBERTa) or pictures (BLIP).

As in `models`: weights spread wide, so that something differs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers as tf
from models import EOS, PAD, Family, _pad, _seq2seq, _spread, _text, _tokens
from torch import Tensor, nn


def _words() -> dict[str, Any]:
    names = ("vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id")
    return {
        **{name: _text()[name] for name in names},
        "eos_token_id": EOS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def bert(kind: str = "Bert", **settings: Any) -> nn.Module:
    """A BERT that reads, and one that writes."""
    torch.manual_seed(0)
    writes = {"is_decoder": True, "add_cross_attention": True, **settings}
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(
        tf.BertConfig(**_words()), getattr(tf, f"{kind}Config")(**{**_words(), **writes})
    )
    config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = PAD, EOS, EOS
    return _spread(tf.EncoderDecoderModel(config=config), 0.15)


def blip(kind: str = "ConditionalGeneration", **settings: Any) -> nn.Module:
    """With label smoothing, as published ones have it. Questions are as wide as pictures."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32 if kind == "QuestionAnswering" else 24,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
    }
    config = tf.BlipConfig(
        text_config={**_words(), "sep_token_id": EOS, "label_smoothing": 0.1, **settings},
        vision_config={**vision, "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        image_text_hidden_size=16,
    )
    return _spread(getattr(tf, f"BlipFor{kind}")(config), 0.15)


def pictures() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def blip_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Pictures, and the beginning of what is said of them; its last token BLIP leaves out."""
    return {"pixel_values": pictures(), "input_ids": _tokens(3, 4)}


def blip_training(model: nn.Module) -> dict[str, Tensor]:
    ids, mask = _pad(_tokens(3, 9), [9, 4, 6], left=False)
    labels = ids.masked_fill(mask == 0, -100)
    return {"pixel_values": pictures(), "input_ids": ids, "attention_mask": mask, "labels": labels}


BERTS = {
    "bert": _seq2seq(bert),
    "roberta": _seq2seq(partial(bert, "Roberta")),
    "blip": Family(blip, blip_inputs, blip_training),
}
