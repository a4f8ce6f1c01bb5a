"""What people do around a patched model gives what it gives without fastvlm (`misuses.USES`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import misused_parts  # noqa: F401
import pytest
import torch
from misuses import OF_ENCODERS, USES, Results, Scene
from models import FAMILIES
from torch import nn
from transformers import PreTrainedModel

import fastvlm
from fastvlm.checking.numbers import BACKWARD, Yardstick
from fastvlm.checking.sides import Reordered


def results(use: str, name: str, put_in: Any, way: Any = None) -> Results:
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.build()
    scene = Scene(model, family.training(model), family.inputs(model), put_in)
    with way or contextlib.nullcontext():
        return USES[use](scene)


def left_alone(model: nn.Module) -> None:
    pass


@contextlib.contextmanager
def reordered() -> Iterator[None]:
    """Without checkpoints, which would be computed again in the usual order."""
    with mock.patch.object(PreTrainedModel, "gradient_checkpointing_enable"), Reordered():
        yield


# of these the arithmetic is in 16 bits
NARROW = ("half_after_patch", "autocast_around_generate")


CASES = [
    (use, name) for use in USES for name in ("bart", "t5gemma" if use in OF_ENCODERS else "gemma2")
]


@pytest.mark.turns(2)
@pytest.mark.parametrize(("use", "name"), CASES, ids=lambda value: value)
def test_gives_what_it_gives_without_fastvlm(use: str, name: str) -> None:
    eps = torch.finfo(torch.bfloat16 if use in NARROW else torch.float32).eps
    own = results(use, name, left_alone)
    assert own
    ours = results(use, name, fastvlm.patch)
    assert own.keys() == ours.keys()
    chosen = {n for n, v in own.items() if not v.is_floating_point()}
    for what in chosen:
        assert torch.equal(ours[what], own[what]), what
    numbers = {n: v for n, v in own.items() if n not in chosen}
    if not numbers:
        return
    # what another order of transformers' own sums changes is what ours may
    yard = Yardstick(numbers, eps, BACKWARD + 1)
    yard.add("other order of sums", results(use, name, left_alone, reordered()))
    verdict = yard.judge(use, {n: ours[n] for n in numbers})
    assert verdict.verdict == "same", verdict
