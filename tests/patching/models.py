"""Tiny models of every family, built from transformers' own classes with random weights.

Weights are spread wide enough that attention, activations and beams really differ; a model at its
initial scale generates one token for ever, and identical outputs would say nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from fastvlm.compat import versions

VOCAB = 99
PAD, EOS = 1, 2


def _spread(model: nn.Module, std: float) -> nn.Module:
    """Random values over the initial ones; norms keep their scale."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.add_(noise * (std if p.dim() > 1 else 0.1))
    return model.eval()


def bart(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = tf.BartConfig(**{**_text(), **settings})
    return _spread(tf.BartForConditionalGeneration(config), 0.15)


def mbart(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = tf.MBartConfig(**{**_text(), **settings})
    return _spread(tf.MBartForConditionalGeneration(config), 0.15)


def _translator(kind: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    calm = {"attention_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    config_class, model_class = (getattr(tf, f"{kind}{end}") for end in ("Config", _MODELS[kind]))
    config = config_class(**{**_text(), **calm, "scale_embedding": True, **settings})
    return _spread(model_class(config), 0.15)


_MODELS = {
    **dict.fromkeys(
        ("M2M100", "Pegasus", "Blenderbot", "BlenderbotSmall"), "ForConditionalGeneration"
    ),
    "Marian": "MTModel",
}


def m2m100(**settings: Any) -> nn.Module:
    """NLLB's, too."""
    return _translator("M2M100", **settings)


def marian(**settings: Any) -> nn.Module:
    """With swish, as published ones have it, and a bias of the logits."""
    model: Any = _translator("Marian", **{"activation_function": "swish", **settings})
    with torch.no_grad():
        model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape))
    return model


def _t5_sizes() -> dict[str, Any]:
    """Distances end within a short text: at nine, in the last of eight buckets."""
    return {
        **{n: v for n, v in _text().items() if n in ("vocab_size", "d_model") or "_token_id" in n},
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 9,
    }


def _t5(kind: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config_class, model_class = (
        getattr(tf, f"{kind}{end}") for end in ("Config", "ForConditionalGeneration")
    )
    return _spread(model_class(config_class(**{**_t5_sizes(), **settings})), 0.15)


def t5(**settings: Any) -> nn.Module:
    return _t5("T5", **settings)


def flan_t5(**settings: Any) -> nn.Module:
    """As mT5 and T5 1.1: a gate, and a head of its own."""
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return _t5("T5", **gated, **settings)


def umt5(**settings: Any) -> nn.Module:
    return _t5("UMT5", **settings)


def gpt2(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return _spread(tf.GPT2LMHeadModel(_gpt2(**settings)), 0.15)


def _gpt2(**settings: Any) -> Any:
    calm = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 128}
    ends = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": EOS}
    return tf.GPT2Config(**{**sizes, **calm, **ends, **settings})


def vit_gpt2(**settings: Any) -> nn.Module:
    """Captions as of nlpconnect's model: a ViT of another width than its GPT-2."""
    torch.manual_seed(0)
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vit = tf.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=16, **calm,
    )  # fmt: skip
    decoder = _gpt2(is_decoder=True, add_cross_attention=True, **settings)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, decoder)
    config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = PAD, EOS, EOS
    return _spread(tf.VisionEncoderDecoderModel(config=config), 0.15)


def whisper(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = tf.WhisperConfig(**{**_sound(), **settings})
    return _spread(tf.WhisperForConditionalGeneration(config), 0.4)


def _sound() -> dict[str, Any]:
    sizes = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 128}
    return {**_text(), **sizes, "begin_suppress_tokens": None, "suppress_tokens": None}


def _text() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": 0,
        "eos_token_id": EOS,
        "decoder_start_token_id": EOS,
        "forced_eos_token_id": None,
        "dropout": 0.0,
    }


def florence2(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    vision = {
        "embed_dim": [16, 32, 32, 32],
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
        "depths": [1, 1, 1, 1],
        "projection_dim": 32,
        "window_size": 4,
        "drop_path_rate": 0.0,
    }
    config = tf.Florence2Config(
        text_config={"model_type": "bart", **_text(), **settings},
        vision_config=vision,
        image_token_id=VOCAB - 1,
        is_encoder_decoder=True,
    )
    return _spread(tf.Florence2ForConditionalGeneration(config), 0.15)


def florenz(**settings: Any) -> nn.Module:
    """Florence-2's encoder before Gemma-2 layers with gated cross-attention."""
    # imported here: it needs transformers 5, and this file is read on older ones as well
    from fastvlm.florenz import FlorenzConfig, FlorenzForConditionalGeneration

    torch.manual_seed(0)
    calm = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    window = {"sliding_window": 5, "attn_logit_softcapping": 5.0}
    config = FlorenzConfig.reduced(
        "3.5B", width=32, vocab_size=VOCAB, encoder_vocab_size=VOCAB - 1, **settings
    )
    config.vision_config.drop_path_rate = 0.0
    for part, values in ((config.encoder, calm), (config.decoder, window)):
        for name, value in values.items():
            setattr(part, name, value)
    model = _spread(FlorenzForConditionalGeneration(config), 0.2)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.encoder_attn_gate.fill_(0.7)
    return model


def _gemma(**settings: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": 0,
        **settings,
    }


def gemma2(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return _spread(tf.Gemma2ForCausalLM(tf.Gemma2Config(**_gemma(**settings))), 0.2)


def t5gemma(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    # where transformers' own cache of encoder states has a window, it fails on more than that
    wide = {"sliding_window": 64} if versions.cross_cache_has_window() else {}
    module = _gemma(**{**wide, **settings})
    config = tf.T5GemmaConfig(
        encoder=dict(module),
        decoder=dict(module),
        vocab_size=VOCAB,
        dropout_rate=0.0,
        attention_dropout=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=0,
    )
    return _spread(tf.T5GemmaForConditionalGeneration(config), 0.2)


def paligemma2(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = tf.PaliGemmaConfig(
        text_config={"model_type": "gemma2", **_gemma(**settings)},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=VOCAB - 1,
        projection_dim=32,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=0,
    )
    return _spread(tf.PaliGemmaForConditionalGeneration(config), 0.2)


def _tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB - 2, (batch, length), generator=generator)


def _pad(ids: Tensor, lengths: list[int], left: bool) -> tuple[Tensor, Tensor]:
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        mask[row, -n:] = 1 if left else mask[row, -n:]
        if not left:
            mask[row, :n] = 1
    return torch.where(mask == 1, ids, PAD), mask


@dataclass(frozen=True)
class Family:
    """A way to build the model, a padded batch for generate(), and one with labels to train on."""

    build: Callable[..., nn.Module]
    inputs: Callable[[nn.Module], dict[str, Tensor]]
    training: Callable[[nn.Module], dict[str, Tensor]]


def _seq2seq_inputs(model: nn.Module) -> dict[str, Tensor]:
    ids, mask = _pad(_tokens(3, 9), [9, 4, 6], left=False)
    return {"input_ids": ids, "attention_mask": mask}


def _with_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    labels, mask = _pad(_tokens(3, 7, 5), [7, 3, 5], left=False)
    return {**inputs, "labels": labels.masked_fill(mask == 0, -100)}


def _florence_inputs(model: nn.Module) -> dict[str, Tensor]:
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    text, mask = _pad(_tokens(3, 6), [6, 2, 4], left=False)
    image = torch.full((3, 5), VOCAB - 1)  # (64 / 32)^2 + 1 tokens
    return {
        "input_ids": torch.cat([image, text], 1),
        "attention_mask": torch.cat([torch.ones_like(image), mask], 1),
        "pixel_values": pixels,
    }


def _whisper_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Three clips of the length that the model takes, two frames for each of its positions."""
    return {"input_features": torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(2))}


def _image_inputs(model: nn.Module) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))}


def _causal_inputs(model: nn.Module) -> dict[str, Tensor]:
    ids, mask = _pad(_tokens(3, 9), [9, 4, 6], left=True)
    return {"input_ids": ids, "attention_mask": mask}


def _causal_training(model: nn.Module) -> dict[str, Tensor]:
    ids, mask = _pad(_tokens(3, 9), [9, 4, 6], left=False)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _paligemma_inputs(model: nn.Module) -> dict[str, Tensor]:
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    text, mask = _pad(_tokens(3, 6), [6, 6, 6], left=True)
    image = torch.full((3, 4), VOCAB - 1)
    ids = torch.cat([image, text], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([torch.ones_like(image), mask], 1),
        "pixel_values": pixels,
        "token_type_ids": torch.zeros_like(ids),
    }


def _paligemma_training(model: nn.Module) -> dict[str, Tensor]:
    inputs = _paligemma_inputs(model)
    types = inputs["token_type_ids"].clone()
    types[:, -4:] = 1
    labels = inputs["input_ids"].masked_fill(types == 0, -100)
    return {**inputs, "token_type_ids": types, "labels": labels}


def _seq2seq(build: Callable[..., nn.Module]) -> Family:
    return Family(build, _seq2seq_inputs, lambda m: _with_labels(_seq2seq_inputs(m)))


FAMILIES = {
    "bart": _seq2seq(bart),
    "mbart": _seq2seq(mbart),
    "florence2": Family(florence2, _florence_inputs, lambda m: _with_labels(_florence_inputs(m))),
    "florenz": Family(florenz, _florence_inputs, lambda m: _with_labels(_florence_inputs(m))),
    "whisper": Family(whisper, _whisper_inputs, lambda m: _with_labels(_whisper_inputs(m))),
    "gemma2": Family(gemma2, _causal_inputs, _causal_training),
    "t5gemma": _seq2seq(t5gemma),
    "paligemma2": Family(paligemma2, _paligemma_inputs, _paligemma_training),
}
# relatives of BART and mBART, which differ in embeddings, activations and the order of norms; T5;
# GPT-2 behind a vision tower and alone
RELATIVES = {
    "m2m_100": _seq2seq(m2m100),
    "marian": _seq2seq(marian),
    "pegasus": _seq2seq(partial(_translator, "Pegasus", activation_function="relu")),
    "blenderbot": _seq2seq(partial(_translator, "Blenderbot")),
    "blenderbot_small": _seq2seq(partial(_translator, "BlenderbotSmall")),
    "t5": _seq2seq(t5),
    "flan_t5": _seq2seq(flan_t5),
    "umt5": _seq2seq(umt5),
    "vit_gpt2": Family(vit_gpt2, _image_inputs, lambda m: _with_labels(_image_inputs(m))),
    "gpt2": Family(gpt2, _causal_inputs, _causal_training),
}
