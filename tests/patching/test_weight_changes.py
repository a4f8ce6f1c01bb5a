"""Weights that change without a trace in ``_version``: nothing stale is computed with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from models import FAMILIES
from test_loss_without_logits import both
from torch import Tensor, nn

import fastvlm
from fastvlm.nn.weight_mark import WeightMark, WrittenTo

Step = Callable[[nn.Module], None]
MESSAGE = "must be looked at before the weights change"


class EightBit(torch.optim.Optimizer):
    """Writes through .data, as optimizers with states of 8 bits do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.data, alpha=-group["lr"])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "8-bit": EightBit,
}


def by_optimizer(name: str) -> Step:
    def step(model: nn.Module) -> None:
        OPTIMIZERS[name](model.parameters()).step()

    return step


def through_data(model: nn.Module) -> None:
    """A merged adapter, an average of weights that is swapped in."""
    for p in model.parameters():
        p.data.mul_(1.5)


def by_another_storage(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 1.5


def from_outside(model: nn.Module) -> None:
    for p in model.parameters():
        p.detach().numpy()[...] *= 1.5


STEPS: dict[str, Step] = {name: by_optimizer(name) for name in OPTIMIZERS}
STEPS |= {f.__name__: f for f in (through_data, by_another_storage, from_outside)}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_logits_after_the_weights_changed(name: str, step: str) -> None:
    """One error; those that were looked at before stay."""
    _, ours, batch = both(name)
    looked, unseen = ours(**batch), ours(**batch)
    before = looked.logits.detach()
    unseen.loss.backward()
    STEPS[step](ours)
    assert torch.equal(looked.logits, before)
    with pytest.raises(RuntimeError, match=MESSAGE):
        _ = unseen.logits


def test_the_error_is_there_for_a_change_that_no_element_looked_at_shows() -> None:
    """One row of the table has a gradient: the optimizer's step tells."""
    _, ours, batch = both("bart")
    out = ours(**batch)
    weight = ours.lm_head.weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[50, 3] = 1
    torch.optim.SGD([weight], lr=0.1, fused=True).step()
    with pytest.raises(RuntimeError, match=MESSAGE):
        _ = out.logits


def test_steps_of_others_change_nothing() -> None:
    """A discriminator's optimizer, one that holds a frozen head, and weights that are NaN."""
    plain, ours, batch = both("bart")
    expected = plain(**batch).logits.detach()
    other = nn.Linear(3, 3)
    other(torch.ones(1, 3)).sum().backward()
    out = ours(**batch)
    torch.optim.AdamW(other.parameters(), fused=True).step()
    seen = batch["labels"] != -100
    assert torch.allclose(out.logits[seen], expected[seen], atol=1e-4)
    ours.lm_head.weight.requires_grad_(False)
    out = ours(**batch)
    out.loss.backward()
    torch.optim.AdamW(ours.parameters(), fused=True).step()
    assert torch.allclose(out.logits[seen], expected[seen], atol=1e-4)
    with torch.no_grad():
        ours.lm_head.weight.fill_(float("nan"))
    assert ours(**batch).logits.isnan().any()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_copies_in_fewer_bits_follow(weights: str, step: str) -> None:
    trained = models.bart()
    batch = FAMILIES["bart"].training(trained)
    fastvlm.patch(trained, weights=weights)
    with torch.no_grad():
        trained(**batch)
    for p in trained.parameters():
        p.grad = torch.ones_like(p)
    STEPS[step](trained)
    fresh = models.bart()
    fresh.load_state_dict(trained.state_dict())
    fastvlm.patch(fresh, weights=weights)
    with torch.no_grad():
        assert torch.equal(trained(**batch).logits, fresh(**batch).logits)


@pytest.mark.parametrize("step", ["adamw-fused", "8-bit", "write"])
@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_a_step_that_was_written_down_reads_no_old_copies(name: str, step: str) -> None:
    """The cache of one prefill goes on after the weights have changed."""
    model = FAMILIES[name].build()
    fastvlm.patch(model, weights="int8")

    def after(model: nn.Module, past: Any) -> Tensor:
        key = "input_ids" if name == "gemma2" else "decoder_input_ids"
        inputs = {} if name == "gemma2" else {"encoder_outputs": (states,)}
        with torch.no_grad():
            out = model(**inputs, **{key: torch.tensor([[7], [8]])}, past_key_values=past)
        return out.logits

    ids = models._tokens(2, 5)
    states = None
    with torch.no_grad():
        if name == "gemma2":
            past = model(input_ids=ids).past_key_values
        else:
            states = model.get_encoder()(input_ids=ids).last_hidden_state
            first = torch.tensor([[2], [2]])
            past = model(encoder_outputs=(states,), decoder_input_ids=first).past_key_values
    after(model, past)
    there = copy.deepcopy(past)
    if step == "write":
        with torch.no_grad():
            for p in model.get_decoder().parameters():
                p.mul_(1.5)
    else:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        by_optimizer(step)(model)
    got = after(model, past)
    fresh = FAMILIES[name].build()
    fresh.load_state_dict(model.state_dict())
    fastvlm.patch(fresh, weights="int8")
    assert torch.allclose(got, after(fresh, there), atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_beams_while_another_thread_trains(name: str, beams: int) -> None:
    """Its optimizer writes between the head and the ranking, which goes on."""
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    settings = {"num_beams": beams, "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    fastvlm.patch(model)

    def train(*args: Any) -> None:
        model.get_output_embeddings().weight.data.mul_(1.0)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.0)

    model.register_forward_hook(train)
    assert torch.equal(model.generate(**inputs, **settings), expected)


def test_marks() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    mark, written = WeightMark(weight), WrittenTo([weight])
    assert mark.is_current(weight)
    assert not written
    weight.data[0, 0] += 1
    assert not mark.is_current(weight)
    assert not written
    with torch.no_grad():
        weight.add_(1)
    assert written
    weight.untyped_storage().resize_(0)
    assert not WeightMark.is_current(mark, weight)
