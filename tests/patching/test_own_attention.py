"""An attention function of a user's own is called, whenever it was named and however it runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import FAMILIES
from sameness import assert_the_same, numbers
from test_families import generate
from torch import Tensor, nn

import fastvlm


def mine(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function of a user's: it reads values only half."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(
        query, key, 0.5 * value, attn_mask=attention_mask, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def registered() -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register("mine", mine)
    AttentionMaskInterface.register("mine", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    yield
    AttentionInterface._global_mapping.pop("mine")
    AttentionMaskInterface._global_mapping.pop("mine")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["bart", "florence2", "gemma2", "t5gemma", "florenz"])
def test_an_attention_function_of_the_users_is_called(
    name: str, when: str, registered: None
) -> None:
    model = FAMILIES[name].build()
    batch, inputs = FAMILIES[name].training(model), FAMILIES[name].inputs(model)
    usual, _ = numbers(model, batch)
    model.set_attn_implementation("mine")
    want, tokens = numbers(model, batch), generate(model.eval(), inputs, num_beams=2)
    assert not torch.allclose(want[0], usual, rtol=1e-4)
    if when == "after":
        model.set_attn_implementation("eager")
    report = fastvlm.patch(model)
    model.set_attn_implementation("mine")
    if when == "before":
        assert any(
            "'mine' is not one of transformers' own" in str(e.reason) for e in report.skipped
        )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert_the_same(numbers(model, batch), want)
        assert torch.equal(generate(model.eval(), inputs, num_beams=2), tokens)
        fixed = generate(model, inputs, num_beams=2, cache_implementation="static")
        assert torch.equal(fixed, tokens)
    if when == "after":
        assert any("'mine' is not one of transformers' own" in str(w.message) for w in told)


@pytest.mark.parametrize("name", ["bart", "florence2"])
def test_an_attention_function_of_the_users_is_part_of_a_graph(name: str, registered: None) -> None:
    """All of generate() compiled, prefill included, and the function named after patching."""
    model = FAMILIES[name].build().eval()
    inputs = FAMILIES[name].inputs(model)
    settings = {"cache_implementation": "static", "num_beams": 2, "max_new_tokens": 5}
    model.set_attn_implementation("mine")
    want = generate(model, inputs, **settings)
    model.set_attn_implementation("eager")
    fastvlm.patch(model)
    model.set_attn_implementation("mine")
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(generate(model, inputs, **settings), want)


def test_an_implementation_that_was_replaced_is_called(monkeypatch: Any) -> None:
    from transformers import AttentionInterface

    model = FAMILIES["bart"].build()
    model.set_attn_implementation("sdpa")
    batch = FAMILIES["bart"].training(model)
    fastvlm.patch(model)
    usual, _ = numbers(model, batch)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", mine)
    with pytest.warns(UserWarning, match="'sdpa' is not one of transformers' own"):
        got = numbers(model, batch)
    fastvlm.unpatch(model)
    assert_the_same(got, numbers(model, batch))
    assert not torch.allclose(got[0], usual, rtol=1e-3)
