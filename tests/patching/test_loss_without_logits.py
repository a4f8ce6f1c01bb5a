"""A patched model's loss: what transformers computes, without its logits and its padding."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from models import FAMILIES, Family
from torch import Tensor, nn

import fastvlm
from fastvlm import ops
from fastvlm.patching.logits import LazyLogits

TRAINED = [name for name in FAMILIES if name != "paligemma2"]


def both(name: str, **settings: Any) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A model, the same one patched, and a padded batch with labels."""
    family = FAMILIES[name]
    plain = family.build(**settings).train()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    return plain, ours, family.training(plain)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: nn.Module, plain: nn.Module, tolerance: float = 2e-5) -> None:
    expected, got = gradients(plain), gradients(ours)
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(got[name], expected[name], rtol=1e-3, atol=tolerance), name


class Calls:
    """Rows that each op was given, while in the block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.rows: dict[str, list[int]] = {name: [] for name in names}
        for name in names:
            monkeypatch.setattr(ops, name, self._counting(name, getattr(ops, name)))

    def _counting(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.rows[name].append(x.shape[:-1].numel())
            return op(x, *args, **kwargs)

        return call


@pytest.mark.parametrize("items", [None, 5, torch.tensor(11)], ids=["mean", "items", "tensor"])
def test_num_items_in_batch(family: Family, items: Any) -> None:
    """transformers' Trainer divides by the tokens of all accumulated batches."""
    plain = family.build().train()
    ours, batch = copy.deepcopy(plain), family.training(plain)
    fastvlm.patch(ours)
    if items is not None:
        batch = {**batch, "num_items_in_batch": items}
    for model in (plain, ours):
        model(**batch).loss.backward()
    assert torch.allclose(ours(**batch).loss, plain(**batch).loss, rtol=1e-5)
    assert_same(ours, plain, 1e-4)


@pytest.mark.parametrize("name", ["bart", "florence2"])
def test_no_logits_and_no_padding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of 7, 3 and 5 tokens on a grid of 7, prompts of 9, 4 and 6 (and an image) on one."""
    _, model, batch = both(name)
    calls = Calls(monkeypatch, "linear", "gelu_mlp", "residual_layer_norm")
    model(**batch)
    encoder = 9 + 4 + 6 if name == "bart" else 3 * 5 + 6 + 2 + 4
    assert set(calls.rows["residual_layer_norm"]) == {encoder, 7 + 3 + 5}
    assert {encoder, 7 + 3 + 5} <= set(calls.rows["gelu_mlp"])
    # projections of the encoder's and the decoder's tokens; the head has no 21 rows, and no 15
    tokens = calls.rows["linear"].count(7 + 3 + 5)
    assert tokens == 2 * (4 + 2)
    assert 21 not in calls.rows["linear"]


@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_sees_the_tokens_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the padded grid that the decoder gave them on, and the groups of those tokens."""
    _, model, batch = both(name)
    calls = Calls(monkeypatch, "linear_cross_entropy")
    groups = torch.tensor([1, 0, 1])
    out = model(**batch, groups=groups, num_groups=2)
    tokens = int((batch["labels"] != -100).sum())
    assert calls.rows["linear_cross_entropy"] == [tokens]
    by_row = (batch["labels"] != -100)[:, 1 if name == "gemma2" else 0 :].sum(1)
    assert torch.equal(out.group_tokens, torch.zeros(2).long().index_add(0, groups, by_row))
    model.eval()(**batch)  # in evaluation the grid is what it is
    assert max(calls.rows["linear_cross_entropy"]) >= tokens


@pytest.mark.parametrize("name", ["t5gemma", "gemma2"])
def test_gemma_stacks_run_packed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, batch = both(name)
    calls = Calls(monkeypatch, "geglu_mlp", "residual_rms_norm")
    model(**batch)
    rows = {9 + 4 + 6, 7 + 3 + 5} if name == "t5gemma" else {9 + 4 + 6}
    assert set(calls.rows["geglu_mlp"]) == rows
    assert set(calls.rows["residual_rms_norm"]) == rows


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("given", ["mask", "ids", "both"])
def test_what_a_collator_may_give(name: str, given: str) -> None:
    """decoder_attention_mask, decoder_input_ids; Gemma-2: no mask at all."""
    plain, ours, batch = both(name)
    labels = batch["labels"]
    if not plain.config.is_encoder_decoder:
        del batch["attention_mask"]
    else:
        if given != "mask":
            ids = torch.where(labels == -100, 7, labels).roll(1, dims=1)
            batch["decoder_input_ids"] = ids
        if given != "ids":
            batch["decoder_attention_mask"] = (labels != -100).long()
    for model in (plain, ours):
        model(**batch).loss.backward()
    assert_same(ours, plain, 1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_labels_with_holes_and_without_any(name: str) -> None:
    plain, ours, batch = both(name)
    labels = batch["labels"]
    labels[0, :3] = -100
    labels[2, 1] = -100
    if name not in ("mbart", "t5gemma"):  # these cannot have a row without any
        labels[1] = -100
    for model in (plain, ours):
        model(**batch).loss.backward()
    assert_same(ours, plain, 1e-4)
    if name not in ("mbart", "t5gemma"):
        batch["labels"] = torch.full_like(labels, -100)
        assert ours(**batch).loss.isnan()
        assert plain(**batch).loss.isnan()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ["left", "unmasked", "bart", "t5gemma", "florenz"])
def test_labels_in_rows_that_the_mask_hides_count_as_before(case: str, training: bool) -> None:
    """Left padding predicts the first token from the last pad; so transformers counts it."""
    name = "gemma2" if case in ("left", "unmasked") else case
    plain, ours, batch = both(name)
    if case == "left":
        batch = FAMILIES["gemma2"].inputs(plain)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    elif case == "unmasked":
        batch["labels"] = batch["input_ids"]
    else:
        batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
        batch["decoder_attention_mask"][0, -2:] = 0
    for model in (plain, ours):
        model.train(training)
        model(**batch).loss.backward()
    assert torch.allclose(ours(**batch).loss, plain(**batch).loss, rtol=1e-5)
    assert_same(ours, plain, 1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_texts_one_behind_another_do_not_see_each_other(training: bool) -> None:
    """DataCollatorWithFlattening: one row, positions that begin anew."""
    plain, ours, _ = both("gemma2")
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]])
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids, "use_cache": False}
    for model in (plain, ours):
        model.train(training)
    assert torch.allclose(ours(**batch).loss, plain(**batch).loss, rtol=1e-5)


def test_only_the_loss() -> None:
    plain, ours, batch = both("bart")
    fastvlm.unpatch(ours)
    report = fastvlm.patch(ours, only="loss")
    named = {op for entry in report.patched for op in entry.ops}
    assert named == {"linear_cross_entropy", "linear_topk", "one gradient with the head"}
    for model in (plain, ours):
        model(**batch).loss.backward()
    assert_same(ours, plain)
    fastvlm.patch(ours, only=["linear", "mlp"])
    assert type(ours(**batch).__dict__["logits"]) is LazyLogits  # patched kinds stay


def test_a_trainer_sees_the_same_signature() -> None:
    plain, ours, _ = both("florence2")
    assert inspect.signature(ours.forward) == inspect.signature(plain.forward)


def test_positional_arguments() -> None:
    plain, ours, batch = both("bart")
    ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
    assert torch.allclose(ours(ids, mask, **batch).loss, plain(ids, mask, **batch).loss, rtol=1e-5)


def test_autocast() -> None:
    plain, ours, batch = both("florence2")
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(**batch), plain(**batch)
    assert got.logits.dtype == expected.logits.dtype == torch.bfloat16
    exact = plain(**batch).loss
    assert (got.loss - exact).abs() <= 2 * (expected.loss - exact).abs() + 1e-2 * exact


def test_low_precision_weights_have_no_loss_of_their_own() -> None:
    model = FAMILIES["bart"].build()
    report = fastvlm.patch(model, weights="int8")
    assert "linear_cross_entropy" not in {op for e in report.patched for op in e.ops}
    batch = FAMILIES["bart"].training(model)
    with torch.no_grad():
        assert type(model(**batch).__dict__["logits"]) is Tensor


def test_a_sequence_classifier_is_left_alone() -> None:
    config = FAMILIES["bart"].build().config
    model = tf.BartForSequenceClassification(config)
    fastvlm.patch(model)
    ids = torch.tensor([[5, 6, 2], [7, 8, 2]])
    assert model(input_ids=ids, labels=torch.tensor([0, 1])).loss.isfinite()
