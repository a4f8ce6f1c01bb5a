"""BLIP: a text model that decodes or encodes as it is called, and a generate() of its own."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import trainer_copy
from bert_models import blip, blip_inputs, blip_training, pictures
from models import PAD, _pad, _spread, _tokens
from sameness import assert_the_same, assert_trains_the_same, numbers
from test_families import generate
from test_loss_without_logits import Calls
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import fastvlm
from fastvlm.decoding import cache as cross_cache

IMAGE_TOKENS = 5
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "early": {"num_beams": 3, "early_stopping": True, "min_new_tokens": 2, "max_new_tokens": 20},
}


def test_the_same_tokens_by_a_step_that_is_written_down(steps: list[Any]) -> None:
    model = blip()
    inputs = blip_inputs(model)
    prompts = {"prompt": inputs, "no prompt": {"pixel_values": pictures()}}
    for left in (True, False):
        ids, mask = _pad(_tokens(3, 6), [6, 3, 4], left)
        prompts[f"padded, left {left}"] = {**inputs, "input_ids": ids, "attention_mask": mask}
    expected = {
        (case, name): generate(model, given, **settings)
        for case, settings in CASES.items()
        for name, given in prompts.items()
    }
    assert len({tuple(t.flatten().tolist()) for t in expected.values()}) > 8
    fastvlm.patch(model, strict=True)
    for (case, name), tokens in expected.items():
        assert torch.equal(generate(model, prompts[name], **CASES[case]), tokens), (case, name)
    assert len(steps) >= len(expected)
    assert None not in steps


def test_keys_of_a_picture_are_held_once() -> None:
    model = blip()
    ask = {"num_beams": 4, "return_dict_in_generate": True}
    plain = generate(model, blip_inputs(model), **ask).past_key_values.cross_attention_cache
    fastvlm.patch(model)
    shared = generate(model, blip_inputs(model), **ask).past_key_values.cross_attention_cache
    assert cross_cache.is_shared(shared)
    assert shared.layers[0].packed[0].shape[0] == 3 * IMAGE_TOKENS
    for theirs, ours in zip(plain.layers, shared.layers):
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-5)
        assert torch.allclose(ours.values, theirs.values, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_training_in_both_forms_of_checkpoints_and_without(smoothing: float) -> None:
    model = blip(label_smoothing=smoothing)
    batch = blip_training(model)
    assert_trains_the_same(model, batch)


def test_training_runs_on_the_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = blip().train()
    batch = blip_training(model)
    fastvlm.patch(model)
    calls = Calls(monkeypatch, "gelu_mlp")
    model(**batch).loss.backward()
    assert set(calls.rows["gelu_mlp"]) == {int(batch["attention_mask"].sum())}


def test_a_loss_for_each_row_and_logits_alone() -> None:
    plain: Any = blip().text_decoder
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    states = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2))
    batch = {**blip_training(ours), "encoder_hidden_states": states}
    del batch["pixel_values"]
    for training in (False, True):
        for ask in ({"reduction": "none"}, {"return_logits": True}, {"logits_to_keep": 0}):
            with torch.no_grad():
                want, got = (m.train(training)(**batch, **ask) for m in (plain, ours))
            if not isinstance(want, Tensor):
                want, got = want.loss, got.loss
            assert isinstance(got, Tensor)
            if want.dim() == 3:  # behind a text nobody reads them
                seen = batch["attention_mask"][:, :-1] == 1
                want, got = want[seen], got[seen]
            assert torch.allclose(got, want, atol=1e-4)


def answering() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ids, mask = _pad(_tokens(3, 6), [6, 3, 4], left=False)
    inputs = {"pixel_values": pictures(), "input_ids": ids, "attention_mask": mask}
    labels, _ = _pad(_tokens(3, 5, 7), [5, 3, 2], left=False)
    return inputs, {**inputs, "labels": labels, "decoder_attention_mask": (labels != PAD).long()}


def test_answers_to_questions_of_several_lengths() -> None:
    """The question's padding is read by the answer, as transformers has it."""
    model = blip("QuestionAnswering")
    inputs, batch = answering()
    asked = [generate(model, inputs, num_beams=n) for n in (1, 3)]
    want = numbers(copy.deepcopy(model), batch)
    report = fastvlm.patch(model)
    (left,) = [e for e in report.skipped if e.kind == "BlipTextModel"]
    assert left.module == "text_encoder"
    assert "its rows see all others here" in str(left.reason)
    assert "text_decoder.bert" in {e.module for e in report.patched}
    for n, tokens in zip((1, 3), asked):
        assert torch.equal(generate(model, inputs, num_beams=n), tokens)
    assert_the_same(numbers(model, batch), want)


def test_pictures_and_texts_are_compared_as_before() -> None:
    model = blip("ImageTextRetrieval")
    inputs, _ = answering()
    with torch.no_grad():
        want = [model(**inputs, use_itm_head=head).itm_score for head in (True, False)]
        report = fastvlm.patch(model)
        got = [model(**inputs, use_itm_head=head).itm_score for head in (True, False)]
    assert "text_encoder" in {e.module for e in report.skipped}
    for ours, theirs in zip(got, want):
        assert torch.allclose(ours, theirs, atol=1e-5)


def decoder() -> Any:
    return blip().text_decoder


def states() -> Tensor:
    return torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2))


def test_a_call_that_is_none_of_a_decoder() -> None:
    """With and without a picture, and with embeddings in place of tokens."""
    plain = decoder().bert
    owner = decoder()
    fastvlm.patch(owner)
    ids, mask = _pad(_tokens(3, 6), [6, 3, 4], left=False)
    embeds = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(3))
    reads: tuple[dict[str, Any], ...] = ({}, {"encoder_hidden_states": states()})
    calls: tuple[dict[str, Any], ...] = (
        {"input_ids": ids},
        {"inputs_embeds": embeds},
        {"encoder_embeds": embeds},
        {"encoder_embeds": embeds, "is_decoder": True},
    )
    for read, given, hidden in itertools.product(reads, calls, (mask, None)):
        arguments = {**read, **given, "attention_mask": hidden}
        with torch.no_grad():
            # it writes into the embeddings that it is given
            want, got = (m(**copy.deepcopy(arguments)) for m in (plain, owner.bert))
        seen = mask == 1 if hidden is not None else torch.ones_like(mask) == 1
        assert torch.allclose(got[0][seen], want[0][seen], atol=1e-5)


def steps_of(model: Any, past: Any, mask: Tensor | None = None) -> tuple[list[Tensor], Any]:
    """Logits of a prefill of four tokens and of two steps."""
    ids, found = _tokens(3, 6), []
    with torch.no_grad():
        for first, last in ((0, 4), (4, 5), (5, 6)):
            out = model(
                input_ids=ids[:, first:last],
                encoder_hidden_states=states(),
                encoder_attention_mask=mask,
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            found.append(out.logits)
    return found, past


def test_caches_of_the_callers(steps: list[Any]) -> None:
    plain, ours = decoder(), decoder()
    fastvlm.patch(ours)
    makers = (
        lambda: None,
        DynamicCache,
        lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    )
    for make in makers:
        (want, kept), (got, _) = (steps_of(model, make()) for model in (plain, ours))
        assert isinstance(kept, EncoderDecoderCache)
        for mine, theirs in zip(got, want):
            assert torch.allclose(mine, theirs, atol=1e-4)
    assert len(steps) == 3
    assert None not in steps


def test_a_mask_of_the_picture_changes_nothing() -> None:
    """It reaches no attention in transformers."""
    plain, ours = decoder(), decoder()
    fastvlm.patch(ours)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1] * 5])
    (want, _), (free, _), (got, _) = (
        steps_of(plain, None, mask), steps_of(plain, None), steps_of(ours, None, mask)
    )  # fmt: skip
    for mine, theirs, other in zip(got, want, free):
        assert torch.allclose(mine, theirs, atol=1e-4)
        assert torch.equal(theirs, other)


def test_without_its_layers_its_attention_is_left_alone() -> None:
    model = blip()
    inputs, batch = blip_inputs(model), blip_training(model)
    expected, want = generate(model, inputs, num_beams=2), numbers(copy.deepcopy(model), batch)
    report = fastvlm.patch(model, only=("attention", "loss"))
    (stack,) = [e for e in report.skipped if e.kind == "BlipTextModel"]
    assert "hands only to layers of fastvlm" in str(stack.reason)
    assert torch.equal(generate(model, inputs, num_beams=2), expected)
    assert_the_same(numbers(model, batch), want)


@pytest.mark.parametrize("path", ["", "layer.1.attention", "layer.0.output.LayerNorm"])
def test_who_looks_at_a_part_sees_what_is_there(path: str) -> None:
    model: Any = blip()
    inputs = blip_inputs(model)
    expected = generate(model, inputs, num_beams=2)
    fastvlm.patch(model)
    seen: list[tuple[int, ...]] = []
    part = model.text_decoder.bert.encoder.get_submodule(path)
    part.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape[:1])))
    assert torch.equal(generate(model, inputs, num_beams=2), expected)
    assert seen == [(6,)] * 12


def test_attentions_that_are_asked_for() -> None:
    plain = blip()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    ask = {"output_attentions": True, "return_dict_in_generate": True, "num_beams": 2}
    want, got = (generate(m, blip_inputs(m), **ask) for m in (plain, ours))
    assert torch.equal(got.sequences, want.sequences)
    assert len(got.attentions) == len(want.attentions)
    for mine, theirs in zip(got.attentions, want.attentions):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, theirs))


def test_unpatched_again_and_patched_in_any_order() -> None:
    model = blip()
    classes = [type(m) for m in model.modules()]
    inputs = blip_inputs(model)
    expected = generate(model, inputs, num_beams=2)
    fastvlm.patch(model, only="linear")
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, num_beams=2), expected)
    fastvlm.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(generate(model, inputs, num_beams=2), expected)
    fastvlm.patch(model, weights="int8")
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, num_beams=2), expected)


PLANTS = {
    "scale": ("/ math.sqrt(self.attention_head_size)",
              "/ (1.01 * math.sqrt(self.attention_head_size))"),
    "residual": ("self.LayerNorm(hidden_states + input_tensor)",
                 "self.LayerNorm(hidden_states + 0.9 * input_tensor)"),
    "the mask is read": (
        "            past_key_values=past_key_values,\n"
        "        )\n        attention_output = self.out",
        "            past_key_values=past_key_values,\n"
        "            encoder_attention_mask=attention_mask,\n"
        "        )\n        attention_output = self.out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("plant", [None, *PLANTS])
def test_a_trainers_copy(plant: str | None) -> None:
    edits = () if plant is None else (PLANTS[plant],)
    module = trainer_copy.module_of("blip_text", *edits)
    torch.manual_seed(0)
    model: nn.Module = _spread(module.BlipTextLMHeadModel(decoder().config), 0.15)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1] * 5])
    want, _ = steps_of(model, None, mask)
    report = fastvlm.patch(model)
    got, _ = steps_of(model, None, mask)
    for mine, theirs in zip(got, want):
        assert torch.allclose(mine, theirs, atol=1e-4)
    told = [e.reason for e in report.skipped if e.reason is not None]
    assert any("of its size apart" in reason for reason in told) == (plant is not None), told
