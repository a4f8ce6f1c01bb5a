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
    MllamaConfig,
    MllamaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    VisionEncoderDecoderModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

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


class Pictures(nn.Module):
    """In place of Mllama's vision tower: what it would give is drawn."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.num_patches = patches
        self.states = nn.Buffer(torch.randn(1, 1, 4, patches, width))

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(self.states.expand(pixel_values.shape[0], -1, -1, -1, -1))


def mllama(tiny: bool) -> Any:
    """Llama-3.2-Vision's decoder at the depth of five layers, the fourth of which reads a picture,
    and with a quarter of its vocabulary."""
    width, inner, heads, vocabulary = (64, 128, 4, 384) if tiny else (4096, 14_336, 32, 32_064)
    texts = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": 5, "num_attention_heads": heads, "num_key_value_heads": heads // 4,
        "cross_attention_layers": [3], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    }  # fmt: skip
    pictures = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_global_layers": 1,
        "attention_heads": 1, "image_size": 28, "patch_size": 14, "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
    }  # fmt: skip
    config = MllamaConfig(text_config=texts, vision_config=pictures, image_token_index=vocabulary)
    model: Any = MllamaForConditionalGeneration(config)
    model.model.vision_model = Pictures(20 if tiny else 1601, 64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("attn_gate", "mlp_gate")):
                p.fill_(0.5)  # shut at first
    return model


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
