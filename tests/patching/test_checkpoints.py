"""A checkpoint around a patched stack computes it again when the call it was part of is over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES
from sameness import assert_the_same, numbers
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastvlm

ENCODERS = ["bart", "mbart", "florence2", "t5gemma", "florenz"]
STACKS = [("decoder", name) for name in (*ENCODERS, "gemma2")]
STACKS += [("encoder", name) for name in ("bart", "florence2", "t5gemma")]


def recomputed(stack: Any) -> None:
    """From now on a non-reentrant checkpoint runs the stack."""
    run = stack.forward
    stack.forward = lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)


def part(model: Any, which: str) -> nn.Module:
    found: nn.Module = model.get_decoder() if which == "decoder" else model.get_encoder()
    return found


@pytest.mark.parametrize(("which", "name"), STACKS)
def test_around_a_stack(which: str, name: str) -> None:
    model = FAMILIES[name].build()
    batch = FAMILIES[name].training(model)
    want = numbers(model, batch)
    fastvlm.patch(model)
    recomputed(part(model, which))
    assert_the_same(numbers(model, batch), want)
    assert_the_same(numbers(model, batch), want)


@pytest.mark.parametrize("name", ["bart", "gemma2", "florenz"])
def test_another_call_before_the_backward_pass(name: str) -> None:
    """Captions are looked at between a loss and its backward pass."""
    model = FAMILIES[name].build()
    batch = FAMILIES[name].training(model)
    want = numbers(model, batch)
    fastvlm.patch(model)
    recomputed(part(model, "decoder"))
    model.zero_grad()
    loss = model(**batch).loss
    model.generate(**FAMILIES[name].inputs(model), max_new_tokens=2)
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    assert_the_same((loss.detach(), torch.cat(grads)), want)
