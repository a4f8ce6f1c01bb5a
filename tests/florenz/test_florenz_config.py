"""The published sizes have the published parameter counts, and small ones the same structure."""

from __future__ import annotations

import pytest
import torch
from transformers import BartConfig, Florence2VisionConfig, Gemma2Config

from fastvlm.florenz import (
    FlorenzConfig,
    FlorenzForConditionalGeneration,
    freeze_as_published,
    parameter_counts,
)

# millions: vision, encoder, decoder body, inserted cross-attention, embedding, total, trainable
PUBLISHED = {
    "0.4B": (90.4, 82.7, 57.5, 0.0, 197.4, 428.8, 337.6),
    "1.0B": (360.6, 207.9, 205.8, 0.0, 263.2, 1039.7, 676.9),
    "3.5B": (360.6, 207.9, 2024.5, 300.0, 589.8, 3485.0, 1097.6),
    "11.2B": (360.6, 207.9, 8324.2, 1409.4, 917.5, 11221.8, 2534.8),
}
PARTS = ("vision", "encoder", "decoder", "cross_attention", "embedding", "total", "trainable")


def on_meta(size: str) -> FlorenzForConditionalGeneration:
    with torch.device("meta"):
        return FlorenzForConditionalGeneration(FlorenzConfig.of_size(size))


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_those_of_the_paper(size: str) -> None:
    counts = parameter_counts(freeze_as_published(on_meta(size)))
    for part, millions in zip(PARTS, PUBLISHED[size]):
        # the paper's figures are rounded, or cut, to a tenth of a million
        assert abs(counts[part] / 1e6 - millions) < 0.1, part
    # the projector: D_v x d, two tables of 50 positions, a LayerNorm
    d_v, d = (1024, 768) if size == "0.4B" else (2048, 1024)
    assert counts["projector"] == d_v * d + 50 * d_v + 2 * d
    names = [p for p in counts if p not in ("total", "trainable")]
    assert counts["total"] == sum(counts[p] for p in names)


@pytest.mark.parametrize("size", ["0.4B", "3.5B"])
def test_what_is_frozen(size: str) -> None:
    model = freeze_as_published(FlorenzForConditionalGeneration(FlorenzConfig.reduced(size)))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for name, _ in model.named_parameters():
        part = name.removeprefix("model.")
        if part.startswith(("vision_tower", "multi_modal_projector")):
            wanted = False
        elif part.startswith("decoder.") and size == "3.5B":
            inserted = ("encoder_attn", "post_encoder_attention_layernorm", "embed_tokens")
            wanted = any(word in part for word in inserted)
        else:
            wanted = True
        assert (name in trained) == wanted, name
    # a second call undoes what a user froze besides
    model.requires_grad_(False)
    freeze_as_published(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("size", PUBLISHED)
def test_special_ids_and_shapes(size: str) -> None:
    config = FlorenzConfig.of_size(size)
    ids = (config.pad_token_id, config.eos_token_id, config.bos_token_id)
    assert ids == (0, 1, 2)
    assert config.decoder_start_token_id == 1
    assert (config.decoder.pad_token_id, config.decoder.eos_token_id) == (0, 1)
    assert (config.encoder.pad_token_id, config.encoder.eos_token_id) == (1, 2)
    assert config.final_logit_softcapping == 30.0
    assert config.get_text_config(decoder=True) is config.decoder
    if config.has_gemma_decoder:
        assert config.decoder.query_pre_attn_scalar == config.decoder.head_dim == 256
        assert config.decoder.cross_attention_hidden_size == 1024


def test_a_config_survives_its_json() -> None:
    for size in ("0.4B", "3.5B"):
        config = FlorenzConfig.reduced(size, layers=1, width=48, image_token_id=7)
        again = FlorenzConfig.from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict()
        assert type(again.decoder) is type(config.decoder)
        assert again.image_token_id == 7


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("width", [16, 64, 256, 96, 128, 160, 208, 336])
def test_reduced_keeps_the_structure(size: str, width: int) -> None:
    full = FlorenzConfig.of_size(size)
    small = FlorenzConfig.reduced(size, layers=3, width=width, vocab_size=50)
    assert type(small.decoder) is type(full.decoder)
    assert small.vision_config.depths == [1, 1, 3, 1]
    assert (small.encoder.encoder_layers, small.decoder.vocab_size) == (3, 50)
    if full.has_gemma_decoder:
        assert small.decoder.num_hidden_layers == 3
        assert small.decoder.num_attention_heads == 2 * small.decoder.num_key_value_heads
        ratio = small.decoder.hidden_size / width
        assert ratio == pytest.approx(full.decoder.hidden_size / 1024, rel=0.15)
    vision = small.vision_config
    assert all(d % n == 0 for d, n in zip(vision.embed_dim, vision.num_heads))
    with torch.device("meta"):
        FlorenzForConditionalGeneration(small)


def test_overrides_change_the_fields_that_they_name() -> None:
    config = FlorenzConfig.of_size(
        "3.5B", decoder={"num_hidden_layers": 4}, final_logit_softcapping=None
    )
    assert config.decoder.num_hidden_layers == 4
    assert config.decoder.hidden_size == 2304
    assert config.final_logit_softcapping is None
    assert FlorenzConfig.of_size("3.5B").decoder.num_hidden_layers == 26


VISION = Florence2VisionConfig(projection_dim=64)
ENCODER = BartConfig(d_model=64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlorenzConfig.of_size("2B"), "size must be one of '0.4B', .*got '2B'"),
        (lambda: FlorenzConfig.reduced("2B"), "size must be one of '0.4B'"),
        (lambda: FlorenzConfig.reduced("0.4B", layers=0), "layers must be a whole number"),
        (lambda: FlorenzConfig.reduced("0.4B", width=40), "width must be a multiple of 16; got 40"),
        (
            lambda: FlorenzConfig(vision_config=VISION, encoder=BartConfig(d_model=32)),
            "vision_config.projection_dim must be the encoder's d_model, 32; got 64",
        ),
        (
            lambda: FlorenzConfig(
                vision_config=VISION, encoder=ENCODER, decoder=BartConfig(d_model=32)
            ),
            "decoder.d_model must be the encoder's d_model, 64; got 32",
        ),
        (
            lambda: FlorenzConfig(
                vision_config=VISION, encoder=Gemma2Config(), decoder=BartConfig(d_model=64)
            ),
            "encoder.model_type must be one of 'bart'; got 'gemma2'",
        ),
        (
            lambda: FlorenzConfig(vision_config=VISION, encoder=ENCODER, decoder=VISION),
            "decoder.model_type must be one of 'bart', 'gemma2'; got 'florence_vision'",
        ),
    ],
)
def test_refusals_name_the_argument(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
