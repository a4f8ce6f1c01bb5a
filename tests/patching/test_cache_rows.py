"""A cache whose rows are reordered, repeated, selected or cropped by hand, across prompts too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FAMILIES
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

import fastvlm

ENCODERS = ["bart", "mbart", "florence2", "t5gemma", "florenz"]
Rows = Callable[[Tensor], Tensor]


def reordered(index: list[int]) -> tuple[Callable[[Any], None], Rows]:
    order = torch.tensor(index)
    return (lambda cache: cache.reorder_cache(order)), (lambda x: x[order])


CHANGES: dict[str, tuple[Callable[[Any], Any], Rows]] = {
    "swap": reordered([1, 0, 2]),
    "one-prompt-for-all": reordered([2, 2, 2]),
    "same": reordered([0, 1, 2]),
    "among-nine": reordered([3, 0, 8, 1, 1, 2, 6, 7, 5]),
    "repeat": (
        lambda cache: cache.batch_repeat_interleave(3), lambda x: x.repeat_interleave(3, 0)
    ),
    "select": (
        lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
        lambda x: x[torch.tensor([2, 0])],
    ),
}  # fmt: skip


def steps(model: nn.Module, name: str, changes: list[str], padded: bool = True) -> list[Tensor]:
    """Logits of a prefill of three prompts and of a step after each change of its cache."""
    inputs = FAMILIES[name].inputs(model)
    mask = inputs["attention_mask"] if padded else torch.ones_like(inputs["attention_mask"])
    ids = torch.tensor([[2, 7, 8], [2, 9, 10], [2, 11, 12]])
    with torch.no_grad():
        out = model(
            **{**inputs, "attention_mask": mask}, decoder_input_ids=ids, use_cache=True
        )  # fmt: skip
        found = [out.logits]
        cache, states = out.past_key_values, out.encoder_last_hidden_state
        token = torch.tensor([[20], [30], [40]])
        for change in changes:
            act, rows = CHANGES[change]
            made = act(cache)
            cache = made if isinstance(made, Cache) else cache
            token, states, mask = rows(token), rows(states), rows(mask)
            step = model(
                encoder_outputs=BaseModelOutput(states), attention_mask=mask,
                decoder_input_ids=token, past_key_values=cache, use_cache=True,
            )  # fmt: skip
            found.append(step.logits)
            token = token + 1
    return found


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("name", ENCODERS)
def test_the_next_step_reads_the_rows_as_they_are_now(name: str, padded: bool) -> None:
    model = FAMILIES[name].build()
    ours = copy.deepcopy(model)
    fastvlm.patch(ours)
    for change in set(CHANGES) - {"among-nine"} if padded else ["swap"]:
        changes = [change, change] if "prompt" in change or change == "swap" else [change]
        assert_steps(ours, model, name, changes, padded)


def assert_steps(ours: Any, model: Any, name: str, changes: list[str], padded: bool = True) -> None:
    for got, want in zip(steps(ours, name, changes, padded), steps(model, name, changes, padded)):
        assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("name", ["bart", "florenz"])
def test_changes_one_after_the_other(name: str) -> None:
    model = FAMILIES[name].build()
    ours = copy.deepcopy(model)
    fastvlm.patch(ours)
    assert_steps(ours, model, name, ["swap", "repeat", "among-nine", "select"])


@pytest.mark.parametrize("name", ["bart", "t5gemma"])
def test_a_step_with_another_mask_than_the_prefills_is_refused(name: str) -> None:
    model = FAMILIES[name].build()
    fastvlm.patch(model)
    inputs = FAMILIES[name].inputs(model)
    with torch.no_grad():
        out = model(**inputs, decoder_input_ids=torch.full((3, 2), 7), use_cache=True)
        states = BaseModelOutput(out.encoder_last_hidden_state)
        given = {"past_key_values": out.past_key_values, "encoder_outputs": states}
        out.past_key_values.reorder_cache(torch.tensor([1, 0, 2]))
        with pytest.raises(ValueError, match=r"attention_mask of a decoding step.*prompt it reads"):
            model(
                **given, decoder_input_ids=torch.full((3, 1), 7),
                attention_mask=inputs["attention_mask"],
            )  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_a_cropped_cache_goes_on(name: str) -> None:
    model = FAMILIES[name].build()
    ours = copy.deepcopy(model)
    fastvlm.patch(ours)

    def run(model: nn.Module) -> list[Tensor]:
        inputs = FAMILIES[name].inputs(model)
        found = []
        with torch.no_grad():
            ids = torch.tensor([[2, 7, 8, 9], [2, 9, 10, 11], [2, 11, 12, 13]])
            out = model(**inputs, decoder_input_ids=ids, use_cache=True)
            cache, states = out.past_key_values, out.encoder_last_hidden_state
            for crop, order in ((-2, [1, 0, 2]), (-1, [1, 0, 2])):
                cache.crop(crop)
                cache.reorder_cache(torch.tensor(order))
                cache.reorder_cache(torch.tensor(order))  # and back
                for token in (20, 21):
                    step = model(
                        encoder_outputs=BaseModelOutput(states), past_key_values=cache,
                        decoder_input_ids=torch.full((3, 1), token), use_cache=True,
                        attention_mask=inputs["attention_mask"],
                    )  # fmt: skip
                    found.append(step.logits)
        return found

    for got, want in zip(run(ours), run(model), strict=True):
        assert torch.allclose(got, want, atol=1e-4)
