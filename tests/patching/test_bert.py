"""BERT and RoBERTa as decoders: what is their own. The rest is tested with the other families."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import trainer_copy
import transformers as tf
from bert_models import BERTS, _words, bert
from models import EOS, PAD, _spread, _tokens
from sameness import assert_the_same, assert_trains_the_same, assert_writes_the_same, numbers
from test_families import generate
from test_loss_without_logits import Calls
from test_relatives import logits_of_steps
from torch import Tensor

import fastvlm
from fastvlm.patching.classes import PatchError, is_patched

NAMES = ["bert", "roberta"]
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static", "num_beams": 2, "disable_compile": True},
}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokens_by_a_step_that_is_written_down(name: str, steps: list[Any]) -> None:
    model = BERTS[name].build()
    inputs = BERTS[name].inputs(model)
    assert_writes_the_same(model, inputs, CASES, steps)


@pytest.mark.parametrize("name", NAMES)
def test_training_in_both_forms_of_checkpoints_and_without(name: str) -> None:
    model = BERTS[name].build()
    batch = BERTS[name].training(model)
    assert_trains_the_same(model, batch)


def test_training_runs_on_the_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    batch = BERTS["bert"].training(model)
    fastvlm.patch(model.train())
    calls = Calls(monkeypatch, "gelu_mlp")
    model(**batch).loss.backward()
    assert set(calls.rows["gelu_mlp"]) == {int((batch["labels"] != -100).sum())}


@pytest.mark.parametrize("start", [EOS, PAD])
def test_pads_among_the_labels(start: int) -> None:
    """The model hides each pad that it makes of its labels, and counts what stands there."""
    model: Any = bert()
    model.config.decoder_start_token_id = start
    batch = BERTS["bert"].training(model)
    labels = batch["labels"].masked_fill(batch["labels"] == -100, PAD)
    labels[0, 3] = PAD
    for given in (labels, labels.masked_fill(labels == PAD, -100)):
        ours = copy.deepcopy(model)
        want = numbers(copy.deepcopy(model), {**batch, "labels": given})
        fastvlm.patch(ours)
        assert_the_same(numbers(ours, {**batch, "labels": given}), want)


@pytest.mark.parametrize("name", NAMES)
def test_a_pad_that_was_written(name: str) -> None:
    """RoBERTa counts no pads; BERT goes by columns."""
    plain = BERTS[name].build()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    cases = {
        # the first step is compared with the model's own
        "a pad among the new": ([[2], [2]], [[7, 11], [PAD, 8], [9, 10]]),
        "in front": ([[2, 7, 8], [PAD, 2, 9]], [[10, 11], [12, 13]]),
        "behind": ([[2, 7, 8], [2, 9, PAD]], [[10, 11], [12, 13]]),
    }
    for ids, tokens in cases.values():
        first = torch.tensor(ids)
        for mask in (None, (first != PAD).long()):
            want = logits_of_steps(plain, first, mask, tokens)
            for got, right in zip(logits_of_steps(ours, first, mask, tokens), want):
                assert torch.allclose(got, right, atol=1e-4)


def decoder(**settings: Any) -> Any:
    config = tf.BertConfig(
        **{**_words(), "is_decoder": True, "add_cross_attention": True, **settings}
    )
    torch.manual_seed(0)
    return _spread(tf.BertLMHeadModel(config), 0.15)


def told_steps(model: Any, **told: Tensor) -> list[Tensor]:
    """Logits of a prefill of four tokens and of two steps, each told of its columns alone."""
    ids, states = _tokens(2, 6), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    past, found = None, []
    with torch.no_grad():
        for first, last in ((0, 4), (4, 5), (5, 6)):
            out = model(
                input_ids=ids[:, first:last],
                encoder_hidden_states=states,
                past_key_values=past,
                use_cache=True,
                **{name: value[:, first:last] for name, value in told.items()},
            )
            past = out.past_key_values
            found.append(out.logits)
    return found


def test_types_and_positions_of_the_callers() -> None:
    plain = decoder()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    types = torch.tensor([[0, 0, 1, 1, 1, 0]] * 2)
    positions = torch.tensor([[9, 8, 7, 7, 6, 0], [0, 1, 2, 3, 5, 8]])
    calls = ({}, {"token_type_ids": types}, {"position_ids": positions})
    for told in (*calls, {"token_type_ids": types, "position_ids": positions}):
        for got, want in zip(told_steps(ours, **told), told_steps(plain, **told)):
            assert torch.allclose(got, want, atol=1e-4)
        if "token_type_ids" in told:
            assert not torch.allclose(want, told_steps(plain)[-1], atol=1e-2)


def test_a_decoder_by_itself() -> None:
    """Without the states that it may read, and one that cannot read any."""
    ids = _tokens(2, 6)
    for crosses in (True, False):
        plain = decoder(add_cross_attention=crosses)
        ours = copy.deepcopy(plain)
        assert not fastvlm.patch(ours).skipped
        with torch.no_grad():
            want, got = (model(ids, labels=ids) for model in (plain, ours))
        assert torch.allclose(got.logits, want.logits, atol=1e-4)
        assert torch.allclose(got.loss, want.loss, atol=1e-5)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["attention_mask"][0, :2] = 0
        expected = generate(plain, inputs, num_beams=2)
        assert torch.equal(generate(ours, inputs, num_beams=2), expected)
        if not crosses:
            for model in (plain, ours):
                with pytest.raises(ValueError, match="add_cross_attention"):
                    model(ids, encoder_hidden_states=torch.ones(2, 5, 32))


def test_what_only_reads_is_none_of_this() -> None:
    config = tf.BertConfig(**_words())
    for kind in (tf.BertModel, tf.BertForMaskedLM, tf.BertForSequenceClassification):
        with pytest.raises(PatchError, match="nothing can be patched"):
            fastvlm.patch(kind(config))
    model: Any = bert()
    fastvlm.patch(model)
    assert not any(map(is_patched, model.encoder.modules()))


REASONS = {
    "pooler": (lambda: tf.BertModel(decoder().config), "pooler reads its first row"),
    "chunks": (lambda: decoder(chunk_size_feed_forward=2), "MLP in pieces"),
    "activation": (lambda: decoder(hidden_act="tanh"), "none that gelu_mlp has"),
    "projected": (
        lambda: tf.ElectraForCausalLM(
            tf.ElectraConfig(**_words(), embedding_size=16, is_decoder=True)
        ),
        "parts of its own: embeddings_project",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_left_alone_with_the_reason(name: str) -> None:
    build, reason = REASONS[name]
    torch.manual_seed(0)
    model = build().eval()
    ids = _tokens(2, 6)
    with torch.no_grad():
        want = model(ids)[0]
        told = {e.reason for e in fastvlm.patch(model).skipped}
        assert any(reason in str(each) for each in told)
        assert torch.allclose(model(ids)[0], want, atol=1e-5)


def test_a_decoder_that_is_made_an_encoder() -> None:
    plain = decoder()
    plain.set_attn_implementation("eager")  # sdpa goes by what attention says of itself
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    ids = _tokens(2, 6)
    logits = []
    for model in (ours, plain):
        with torch.no_grad():
            before = model(ids).logits
            model.config.is_decoder = False
            logits.append(model(ids).logits)
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert not torch.allclose(before, logits[1], atol=1e-2)


PARTS = [
    *("encoder", "encoder.layer.1.attention", "encoder.layer.1.attention.output"),
    *("encoder.layer.1.crossattention.output.dropout", "encoder.layer.1.intermediate"),
    *("encoder.layer.1.output", "encoder.layer.1.attention.self", "embeddings"),
]


@pytest.mark.parametrize("path", PARTS)
def test_who_looks_at_a_part_sees_what_is_there(path: str) -> None:
    model: Any = bert()
    inputs, batch = BERTS["bert"].inputs(model), BERTS["bert"].training(model)
    expected, want = generate(model, inputs), numbers(copy.deepcopy(model), batch)
    fastvlm.patch(model)
    seen: list[tuple[int, ...]] = []

    def look(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        first = args[0] if args else kwargs["input_ids"]
        seen.append(tuple(first.shape[:2]))

    model.decoder.bert.get_submodule(path).register_forward_hook(look, with_kwargs=True)
    assert torch.equal(generate(model, inputs), expected)
    assert len(seen) == 12
    seen.clear()
    assert_the_same(numbers(model, batch), want)
    assert seen == [(3, 7)]


def test_dropout_is_drawn_in_training_alone() -> None:
    model = bert(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    fastvlm.patch(model)
    batch = BERTS["bert"].training(model)
    with torch.no_grad():
        assert model(**batch).loss == model(**batch).loss
        model.train()
        losses = torch.stack([model(**batch).loss for _ in range(4)])
    assert len(set(losses.tolist())) == 4


PLANTS = {
    "scale": ("key.transpose(2, 3)) * scaling", "key.transpose(2, 3)) * (1.01 * scaling)"),
    "residual": ("self.LayerNorm(hidden_states + input_tensor)",
                 "self.LayerNorm(hidden_states + 0.9 * input_tensor)"),
    "intermediate": ("self.intermediate_act_fn(hidden_states)",
                     "self.intermediate_act_fn(1.1 * hidden_states)"),
    "rows see all": ("attention_mask = create_causal_mask(",
                     "attention_mask = create_bidirectional_mask("),
}  # fmt: skip


@pytest.mark.parametrize("plant", [None, *PLANTS])
def test_a_trainers_copy(plant: str | None) -> None:
    edits = () if plant is None else (PLANTS[plant],)
    if plant == "rows see all":
        old = "                past_key_values=past_key_values,\n            )\n        else:"
        edits = (*edits, (old, "            )\n        else:"))
    module = trainer_copy.module_of("bert", *edits)
    torch.manual_seed(0)
    model = _spread(module.BertLMHeadModel(decoder().config), 0.15)
    ids, states = _tokens(2, 6), torch.randn(2, 5, 32)
    with torch.no_grad():
        want = model(ids, encoder_hidden_states=states).logits
        report = fastvlm.patch(model)
        assert torch.allclose(model(ids, encoder_hidden_states=states).logits, want, atol=1e-4)
    told = [e.reason for e in report.skipped if e.reason is not None]
    assert any("of its size apart" in reason for reason in told) == (plant is not None), told
