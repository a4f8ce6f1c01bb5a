"""Logits of a call with labels: computed for those who look, and right whoever looks."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import transformers as tf
from models import RELATIVES
from test_families import generate
from test_loss_without_logits import TRAINED, assert_same, both
from torch import Tensor, nn

import fastvlm
from fastvlm.patching.logits import LazyLogits


@pytest.mark.parametrize("name", TRAINED)
def test_logits_for_those_who_ask(name: str) -> None:
    plain, ours, batch = both(name)
    expected, got = plain(**batch), ours(**batch)
    assert isinstance(got.__dict__["logits"], LazyLogits)  # nobody has asked
    labelled = batch["labels"] != -100
    for logits in (got.logits, got["logits"], got[1], dict(got.items())["logits"]):
        assert type(logits) is Tensor
        assert logits.dtype == expected.logits.dtype
        assert torch.allclose(logits[labelled], expected.logits[labelled], atol=1e-4)
    assert list(got.keys()) == [k for k in expected if k not in ("past_key_values", "cache")]
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


class Cooled(tf.T5ForConditionalGeneration):
    """Its logits are others than its head's."""

    def forward(self, labels: Any = None, **kwargs: Any) -> Any:
        out = super().forward(labels=labels, **kwargs)
        out.logits = 0.7 * out.logits
        return out


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_model_that_computes_with_its_logits_generates(weights: str | None) -> None:
    model: Any = RELATIVES["flan_t5"].build()
    model.__class__ = Cooled
    inputs = RELATIVES["flan_t5"].inputs(model)
    ask: dict[str, Any] = {"num_beams": 2, "return_dict_in_generate": True, "output_scores": True}
    want = generate(model, inputs, **ask)
    fastvlm.patch(model, weights=weights)
    got = generate(model, inputs, **ask)
    if weights is None:
        assert torch.equal(got.sequences, want.sequences)
        assert torch.allclose(got.sequences_scores, want.sequences_scores, atol=1e-4)
    assert torch.equal(generate(model, inputs, num_beams=2), got.sequences)
