"""A patched model's loss: what transformers computes, without its logits and its padding."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
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


@pytest.mark.parametrize("name", TRAINED)
def test_logits_for_those_who_ask(name: str) -> None:
    plain, ours, batch = both(name)
    expected, got = plain(**batch), ours(**batch)
    assert isinstance(dict(got.items())["logits"], LazyLogits)  # nobody has asked
    labelled = batch["labels"] != -100
    for logits in (got.logits, got["logits"], got[1], dict(got.items())["logits"]):
        assert type(logits) is Tensor
        assert logits.dtype == expected.logits.dtype
        assert torch.allclose(logits[labelled], expected.logits[labelled], atol=1e-4)
    assert list(got.keys()) == [k for k in expected if k != "past_key_values"]
    again = pickle.loads(pickle.dumps(ours(**batch)))
    assert type(again) is type(expected)
    assert torch.equal(again.logits, got.logits)


@pytest.mark.parametrize("name", TRAINED)
def test_evaluation_has_all_logits_among_its_items(name: str) -> None:
    """As Trainer.evaluate gathers them; also where labels are ignored."""
    plain, ours, batch = both(name)
    with torch.no_grad():
        expected, got = plain.eval()(**batch), ours.eval()(**batch)
    assert torch.allclose(got.loss, expected.loss, rtol=1e-5)
    values = dict(zip(got.keys(), got.values()))
    assert type(values["logits"]) is Tensor
    if name != "t5gemma":  # there pad tokens are masked, and patched outputs are zeros at padding
        right = batch.get("attention_mask") if name == "gemma2" else None
        shown = torch.ones_like(batch["labels"], dtype=torch.bool) if right is None else right != 0
        assert torch.allclose(got.logits[shown], expected.logits[shown], atol=1e-4)


def test_tuples() -> None:
    plain, ours, batch = both("bart")
    loss, logits, *_ = ours(**batch, return_dict=False)
    expected = plain(**batch, return_dict=False)
    assert type(logits) is Tensor
    assert torch.allclose(loss, expected[0])


def test_logits_are_those_of_the_call() -> None:
    """Not of weights that have changed since; with gradients, and as autocast made them."""
    plain, ours, batch = both("bart")
    out = ours(**batch)
    with torch.no_grad():
        assert not out.logits.argmax(-1).requires_grad
    assert out.logits.requires_grad
    for model in (plain, ours):
        model.zero_grad()
        out = model(**batch)
        with torch.no_grad():
            _ = out.logits
        (out.loss + out.logits[batch["labels"] != -100].square().mean()).backward()
    assert_same(ours, plain)
    out = ours(**batch)
    out.loss.backward()
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="must be looked at before the weights change"):
        _ = out.logits
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(**batch), plain(**batch)
    assert got.logits.dtype == expected.logits.dtype


def test_the_loss_by_its_place_and_get() -> None:
    _, model, batch = both("bart")
    out = model(**batch)
    assert torch.equal(out[0], out.loss)
    assert type(out.__dict__["logits"]) is LazyLogits
    assert type(out.get("logits")) is Tensor
    assert out.get("nothing", 5) == 5


def test_a_teacher_inside_of_a_students_call() -> None:
    _, student, batch = both("bart")
    _, teacher, _ = both("bart")
    seen: list[Any] = []
    inputs = {**batch, "decoder_input_ids": batch["labels"].clamp_min(1)}
    del inputs["labels"]

    def hook(*args: Any) -> None:
        with torch.no_grad():
            seen.append(teacher(**inputs).logits)

    student.model.decoder.register_forward_hook(hook)
    student(**batch).loss.backward()
    assert type(seen[0]) is Tensor


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


@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_hidden_states_behind_the_last_label(name: str) -> None:
    plain, ours, batch = both(name)
    batch["labels"][:, -2:] = -100
    batch.pop("attention_mask") if name == "gemma2" else None
    states = [m(**batch, output_hidden_states=True) for m in (plain, ours)]
    key = "hidden_states" if name == "gemma2" else "decoder_hidden_states"
    for a, b in zip(*(s[key] for s in states)):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_loss_of_the_users_own_gets_logits() -> None:
    _, model, batch = both("florence2")
    seen = []

    def loss(logits: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        flat = logits.float().flatten(0, 1)
        seen.append(type(flat))
        return nn.functional.cross_entropy(flat, labels.flatten(), label_smoothing=0.1)

    model.loss_function = loss
    model(**batch).loss.backward()
    assert seen == [Tensor]
    assert model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("smoothing", [0.1, 0.0])
def test_options_of_cross_entropy(smoothing: float) -> None:
    """label_smoothing and class weights are PyTorch's business: it gets the logits."""
    plain, ours, batch = both("florence2")
    weight = torch.rand(plain.lm_head.out_features) if smoothing == 0 else None

    def loss(logits: Any, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        flat = logits.view(-1, vocab_size)
        return nn.functional.cross_entropy(
            flat, labels.view(-1), weight=weight, label_smoothing=smoothing
        )

    for model in (plain, ours):
        model.loss_function = loss
        model(**batch).loss.backward()
    assert_same(ours, plain)


def test_the_label_smoother_of_transformers() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    plain, ours, batch = both("bart")
    smooth = LabelSmoother(epsilon=0.1)
    for model in (plain, ours):
        smooth(model(**batch), batch["labels"]).backward()
    assert_same(ours, plain)


def test_only_the_loss() -> None:
    plain, ours, batch = both("bart")
    fastvlm.unpatch(ours)
    report = fastvlm.patch(ours, only="loss")
    named = {op for entry in report.patched for op in entry.ops}
    assert named == {"linear_cross_entropy", "one gradient with the head"}
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


def test_the_head_alone_gives_logits() -> None:
    _, model, batch = both("bart")
    h = torch.randn(2, 32)
    assert type(model.lm_head(h)) is Tensor
    model(**batch)
    assert type(model.lm_head(h)) is Tensor


def test_a_hook_on_the_head_sees_logits() -> None:
    plain, ours, batch = both("bart")
    seen = []
    ours.lm_head.register_forward_hook(lambda m, args, out: seen.append(type(out)))
    assert torch.allclose(ours(**batch).loss, plain(**batch).loss, rtol=1e-5)
    assert seen == [Tensor]


def test_autocast() -> None:
    plain, ours, batch = both("florence2")
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(**batch), plain(**batch)
    assert got.logits.dtype == expected.logits.dtype == torch.bfloat16
    exact = plain(**batch).loss
    assert (got.loss - exact).abs() <= 2 * (expected.loss - exact).abs() + 1e-2 * exact


def test_pickled_and_copied_models_keep_the_loss() -> None:
    _, ours, batch = both("bart")
    expected = ours(**batch).loss
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for model in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        out = model(**batch)
        assert type(out.__dict__["logits"]) is LazyLogits
        assert torch.equal(out.loss, expected)


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
