"""Uses of a patched model that once ended in an obscure error: now right, or refused clearly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from models import FAMILIES, _spread, _text
from test_families import generate
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

import fastvlm


def causal(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "bart":
        return _spread(tf.BartForCausalLM(tf.BartConfig(**_text())), 0.15)
    return _spread(tf.MBartForCausalLM(tf.MBartConfig(**_text())), 0.15)


@pytest.mark.parametrize("name", ["bart", "mbart"])
def test_a_decoder_without_an_encoder(name: str) -> None:
    model = causal(name)
    ids = torch.randint(3, 90, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    ours = copy.deepcopy(model)
    fastvlm.patch(ours)
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, model(ids).logits, atol=1e-4)
        for settings in ({}, {"num_beams": 3}, {"use_cache": False}):
            want = generate(model, {"input_ids": ids, "attention_mask": mask}, **settings)
            got = generate(ours, {"input_ids": ids, "attention_mask": mask}, **settings)
            assert torch.equal(got, want)
        states = torch.randn(2, 5, 32)
        given = {"input_ids": ids, "encoder_hidden_states": states}
        assert torch.allclose(ours(**given).logits, model(**given).logits, atol=1e-4)


@pytest.mark.parametrize("name", ["bart", "gemma2", "florenz"])
def test_beams_while_the_weights_change(name: str) -> None:
    """An optimizer in another thread steps between a forward pass and the ranking of its tokens."""
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    want = generate(model, inputs, num_beams=3)
    fastvlm.patch(model)
    weight = model.get_output_embeddings().weight

    def step(*args: Any) -> None:
        with torch.no_grad():
            weight.mul_(1)  # a new version, the same values

    model.register_forward_hook(step)
    assert torch.equal(generate(model, inputs, num_beams=3), want)


@pytest.mark.parametrize("name", ["bart", "florence2"])
def test_a_static_cache_used_again_for_longer_prompts(name: str) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    states = torch.randn(3, 9, 32)

    def run(model: Any, lengths: tuple[int, ...], room: int = 5) -> list[Tensor]:
        decoder = model.config.get_text_config(decoder=True)
        cache = EncoderDecoderCache(
            StaticCache(decoder, max_cache_len=16), StaticCache(decoder, max_cache_len=room)
        )
        found = []
        for length in lengths:
            cache.reset()
            for token in (5, 6):
                out = model(
                    encoder_outputs=BaseModelOutput(states[:, :length]), past_key_values=cache,
                    attention_mask=inputs["attention_mask"].new_ones(3, length), use_cache=True,
                    decoder_input_ids=torch.full((3, 1), token),
                )  # fmt: skip
                found.append(out.logits)
        return found

    ours = copy.deepcopy(model)
    fastvlm.patch(ours)
    with torch.no_grad():
        # of the unpatched model a cache for each, as it is filled in one go
        want = [logits for length in (4, 9, 6) for logits in run(model, (length,), length)]
        for got, expected in zip(run(ours, (4, 9, 6)), want, strict=True):
            assert torch.allclose(got, expected, atol=1e-4)
