"""TrOCR: a decoder whose stack hands its layers only the arguments that it knows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from model_types import TYPES, image
from models import EOS, PAD, VOCAB
from packaging.version import Version
from sameness import assert_the_same, assert_trains_the_same, assert_writes_the_same, numbers
from test_families import generate
from test_loss_without_logits import Calls
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers.models.trocr.modeling_trocr import TrOCRDecoderLayer

import fastvlm

KINDS = {"learned": "vit+trocr", "waves": "vit+trocr of waves"}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "early": {"num_beams": 3, "early_stopping": True, "min_new_tokens": 2, "max_new_tokens": 20},
}
# older ones count positions by the length of a static cache, a tensor, and fail
if Version(tf.__version__) >= Version("5.17"):
    CASES["static"] = {
        "cache_implementation": "static", "num_beams": 2, "disable_compile": True
    }  # fmt: skip


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return TYPES[KINDS[request.param]].make()


def wrapped(model: Any, kind: CheckpointImpl) -> None:
    apply_activation_checkpointing(
        model,
        lambda layer: checkpoint_wrapper(layer, checkpoint_impl=kind),
        lambda module: isinstance(module, TrOCRDecoderLayer),
    )


def test_the_same_tokens_by_a_step_that_is_written_down(model: Any, steps: list[Any]) -> None:
    inputs, _ = image()
    assert_writes_the_same(model, inputs, CASES, steps)


def test_training_with_each_kind_of_checkpoint_and_without(model: Any) -> None:
    batch = image()[1]
    assert_trains_the_same(model, batch)


@pytest.mark.parametrize("kind", CheckpointImpl)
def test_training_with_wrapped_layers(model: Any, kind: CheckpointImpl) -> None:
    batch = image()[1]
    want = numbers(model, batch)
    for first in (fastvlm.patch, lambda m: wrapped(m, kind)):
        ours = copy.deepcopy(model)
        first(ours)
        wrapped(ours, kind) if first is fastvlm.patch else fastvlm.patch(ours)
        assert_the_same(numbers(ours, batch), want)


def test_training_runs_on_the_tokens_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = dict(image()[1])
    ids = batch["labels"].masked_fill(batch["labels"] == -100, PAD)
    batch["decoder_input_ids"] = torch.cat([torch.full((3, 1), EOS), ids[:, :-1]], 1)
    batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
    want = numbers(model, batch)
    fastvlm.patch(model)
    calls = Calls(monkeypatch, "gelu_mlp")
    assert_the_same(numbers(model, batch), want)
    assert set(calls.rows["gelu_mlp"]) == {int(batch["decoder_attention_mask"].sum())}


def test_only_keys_of_images_keep_their_weights(model: Any) -> None:
    report = fastvlm.patch(model, weights="int8")
    layer = "decoder.model.decoder.layers.0."
    of = {e.module: e.ops for e in report.entries if e.module.startswith(layer)}
    for part, op in (("self_attn", "low_precision_linear"), ("encoder_attn", "linear")):
        assert of[f"{layer}{part}.k_proj"] == of[f"{layer}{part}.v_proj"] == (op,)
    assert of[f"{layer}encoder_attn.q_proj"] == ("low_precision_linear",)


def test_left_alone_with_the_reason_where_its_layers_are(model: Any) -> None:
    inputs, batch = image()
    expected, want = generate(model, inputs, num_beams=3), numbers(copy.deepcopy(model), batch)
    report = fastvlm.patch(model, only=("attention", "loss"))
    (stack,) = [e for e in report.skipped if e.kind == "TrOCRDecoder"]
    assert stack.reason is not None
    assert "hands only to layers of fastvlm" in stack.reason
    assert torch.equal(generate(model, inputs, num_beams=3), expected)
    assert_the_same(numbers(model, batch), want)


def test_a_layer_whose_class_is_put_back_is_seen(model: Any) -> None:
    """transformers' own layer hands no layouts on, so the stack runs as transformers has it."""
    inputs, batch = image()
    expected, want = generate(model, inputs), numbers(copy.deepcopy(model), batch)
    fastvlm.patch(model)
    model.decoder.model.decoder.layers[1].__class__ = TrOCRDecoderLayer
    with pytest.warns(UserWarning, match="hands only to layers of fastvlm"):
        assert_the_same(numbers(copy.deepcopy(model), batch), want)
    assert torch.equal(generate(model, inputs), expected)


def test_a_caller_that_says_whether_to_cache(model: Any) -> None:
    inputs, _ = image()
    ids = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(model)
    fastvlm.patch(model)
    for use in (True, False, None):
        with torch.no_grad():
            ours, theirs = (
                m(**inputs, decoder_input_ids=ids, use_cache=use) for m in (model, plain)
            )
        assert torch.allclose(ours.logits, theirs.logits, atol=1e-4)
        assert (ours.past_key_values is None) == (theirs.past_key_values is None)


def reading_24(model: Any) -> nn.Module:
    """The decoder anew, for states that are not of its width."""
    config = copy.deepcopy(model.decoder.config)
    config.cross_attention_hidden_size = 24
    torch.manual_seed(0)
    return tf.TrOCRForCausalLM(config).eval()


def test_rows_padded_in_front_that_read_padded_states(model: Any) -> None:
    decoder = reading_24(model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    batch = {
        "input_ids": ids.masked_fill(mask == 0, PAD),
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }
    want = numbers(decoder, batch)
    fastvlm.patch(decoder)
    assert_the_same(numbers(decoder, batch), want)


def test_a_decoder_by_itself(model: Any) -> None:
    """Without an encoder's states, and with those of one as wide as the decoder is not."""
    plain = reading_24(model)
    ours = copy.deepcopy(plain)
    report = fastvlm.patch(ours)
    assert not report.skipped
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    states = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for read in ({}, {"encoder_hidden_states": states}):
            got, want = (m(input_ids=ids, **read).logits for m in (ours, plain))
            assert torch.allclose(got, want, atol=1e-4)
