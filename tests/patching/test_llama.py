"""Llama alone: what is its own. The rest is in test_families.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from llama_models import LLAMAS, llama
from models import (
    FAMILIES,
    PAD,
    VOCAB,
    _causal_inputs,
    _causal_training,
    _spread,
)
from sameness import assert_the_same, assert_trains_the_same, assert_writes_the_same, numbers
from test_families import generate
from torch import Tensor, nn
from transformers import masking_utils
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

import fastvlm
from fastvlm.decoding.prefixes import decoder_stack

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static", "num_beams": 2, "disable_compile": True},
}
INPUTS = _causal_inputs(nn.Module())


def test_the_same_tokens_by_a_step_that_is_written_down(steps: list[Any]) -> None:
    assert_writes_the_same(llama(), INPUTS, CASES, steps)


def test_training() -> None:
    assert_trains_the_same(llama(), _causal_training(nn.Module()))


@pytest.mark.parametrize(
    "settings",
    [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True, "head_dim": 12}],
)
def test_variants_of_its_configuration(settings: dict[str, Any]) -> None:
    model = llama(**settings)
    expected, batch = generate(model, INPUTS, num_beams=3), _causal_training(nn.Module())
    want = numbers(copy.deepcopy(model), batch)
    fastvlm.patch(model, strict=True)
    assert torch.equal(generate(model, INPUTS, num_beams=3), expected)
    assert_the_same(numbers(model, batch), want)


class Doubled(LlamaDecoderLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


class Plain(LlamaModel):
    pass


@pytest.mark.parametrize("kind", [Plain, Doubled])
def test_a_trainers_copy_is_tried(kind: Any) -> None:
    model: Any = llama()
    if kind is Plain:
        model.model.__class__ = Plain
    else:
        model.model.layers[0].__class__ = Doubled
    expected, batch = generate(model, INPUTS), _causal_training(nn.Module())
    want = numbers(copy.deepcopy(model), batch)
    report = fastvlm.patch(model)
    found = {e.kind for e in report.skipped}
    assert found == (set() if kind is Plain else {"Doubled"})
    assert torch.equal(generate(model.eval(), INPUTS), expected)
    assert_the_same(numbers(model, batch), want)


def test_a_relative_is_left_alone() -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = tf.MistralForCausalLM(tf.MistralConfig(**sizes, **heads))
    with pytest.raises(ValueError, match="nothing can be patched"):
        fastvlm.patch(model)


def test_behind_a_vision_tower() -> None:
    """LLaVA, which gives its text nothing but embeddings."""
    text = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        "projection_dim": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    config = tf.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=VOCAB - 1, vision_feature_layer=-1
    )
    model = _spread(tf.LlavaForConditionalGeneration(config), 0.2)
    ids = torch.cat([torch.full((3, 4), VOCAB - 1), INPUTS["input_ids"]], 1)
    mask = torch.cat([torch.ones(3, 4, dtype=torch.int64), INPUTS["attention_mask"]], 1)
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    batch = {**inputs, "labels": ids.masked_fill((mask == 0) | (ids == VOCAB - 1), -100)}
    expected = [generate(model, inputs, num_beams=n) for n in (1, 3)]
    want = numbers(copy.deepcopy(model), batch)
    report = fastvlm.patch(model)
    assert "self_attention" in {op for entry in report.patched for op in entry.ops}
    for n, tokens in zip((1, 3), expected):
        assert torch.equal(generate(model.eval(), inputs, num_beams=n), tokens)
    assert_the_same(numbers(model, batch), want)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mllama"])
def test_an_encoder_made_of_a_decoder(name: str) -> None:
    """Its configuration says that rows see all others; with a mask, and with labels that end."""
    family = {**FAMILIES, **LLAMAS}[name]
    plain = family.build()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    batch = family.training(nn.Module())
    whole = {n: value for n, value in batch.items() if n != "attention_mask"}
    for given in (batch, whole):
        causal = numbers(ours, given)
        found = []
        for model in (plain, ours):
            config = decoder_stack(model).config
            config.is_causal = False
            found.append(numbers(model, given))
            del config.is_causal
        assert_the_same(found[1], found[0])
        if given is batch and hasattr(masking_utils, "create_bidirectional_mask"):
            assert not torch.equal(causal[0], found[1][0])
