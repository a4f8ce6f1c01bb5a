"""The models: true shapes and random weights, or tiny ones of the same form."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    DonutSwinConfig,
    DonutSwinModel,
    GenerationMixin,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBartConfig,
    MBartForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    VisionEncoderDecoderModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

# Times the spread that keeps a row's size. Where that is chaos (float32 itself has other tokens
# than float64), less.
WIDE = 3.0
NARROWER = {"blip": 1.4}


def whisper_small(tiny: bool) -> Any:
    layers, width, inner, vocabulary = (2, 64, 128, 384) if tiny else (12, 768, 3072, 51_865)
    config = WhisperConfig(
        vocab_size=vocabulary, d_model=width, num_mel_bins=80,
        encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=inner, decoder_ffn_dim=inner,
        encoder_attention_heads=width // 64, decoder_attention_heads=width // 64,
        max_source_positions=32 if tiny else 1500,
        pad_token_id=2, bos_token_id=2, eos_token_id=2, decoder_start_token_id=3,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def flan_t5_base(tiny: bool) -> Any:
    layers, width, inner, vocabulary = (2, 64, 128, 384) if tiny else (12, 768, 2048, 32_128)
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=64, d_ff=inner, num_layers=layers,
        num_heads=width // 64, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def nllb_600m(tiny: bool) -> Any:
    layers, width, inner, vocabulary = (2, 64, 128, 384) if tiny else (12, 1024, 4096, 256_206)
    config = M2M100Config(
        vocab_size=vocabulary, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_ffn_dim=inner, decoder_ffn_dim=inner, encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64, max_position_embeddings=1024, scale_embedding=True,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0,
    )  # fmt: skip
    return M2M100ForConditionalGeneration(config)


def donut_base(tiny: bool) -> Any:
    """The encoder has one small stage: only the shape of its states is the true one's."""
    layers, width, inner, vocabulary = (2, 64, 128, 384) if tiny else (4, 1024, 4096, 57_525)
    decoder = MBartForCausalLM(
        MBartConfig(
            vocab_size=vocabulary, d_model=width, decoder_layers=layers, decoder_ffn_dim=inner,
            decoder_attention_heads=width // 64, max_position_embeddings=1536,
            scale_embedding=True, add_final_layer_norm=True, is_decoder=True,
            add_cross_attention=True, is_encoder_decoder=False,
        )
    )  # fmt: skip
    encoder = DonutSwinModel(
        DonutSwinConfig(image_size=64, embed_dim=width, depths=[1], num_heads=[4], window_size=2)
    )
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.generation_config.decoder_start_token_id = 0
    model.generation_config.pad_token_id = model.config.pad_token_id = 1
    return model


def blip_base(tiny: bool) -> Any:
    """The encoder has one layer: only the shape of its states is the true one's."""
    layers, width, inner, vocabulary = (2, 64, 128, 384) if tiny else (12, 768, 3072, 30_524)
    own = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": width // 64}
    texts = {
        **own, "vocab_size": vocabulary, "num_hidden_layers": layers, "encoder_hidden_size": width,
        "projection_dim": width, "bos_token_id": 3, "sep_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    pictures = {**own, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    config = BlipConfig(text_config=texts, vision_config=pictures, image_text_hidden_size=width)
    return BlipForConditionalGeneration(config)


def built(make: Any, tiny: bool) -> Any:
    """In eval mode, and without an end: a text is as long as it is asked to be."""
    torch.manual_seed(0)
    model = make(tiny).eval()
    _widen(model)
    for module in model.modules():
        if isinstance(module, GenerationMixin):
            module.generation_config.eos_token_id = None
            module.generation_config.forced_eos_token_id = None
    return model


@torch.no_grad()
def _widen(model: nn.Module) -> None:
    """Products keep the size of what they read: drawn as for training they hardly change the
    stream, and the same token follows for ever. A head that shares the embedding's weights too."""
    wide = NARROWER.get(model.config.model_type, WIDE)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in tables:
            # T5's queries are not scaled: their weights are
            scale = 0.125 if name.endswith("Attention.q") else 1.0
            module.weight.normal_(std=scale * wide / module.in_features**0.5)
