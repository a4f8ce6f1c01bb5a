"""Whether a patched model computes what it computed before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from test_families import generate
from torch import Tensor, nn

import fastvlm


def numbers(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients one after the other."""
    model.train()
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    grads = [p.grad.flatten() for _, p in model.named_parameters() if p.grad is not None]
    return loss.detach(), torch.cat(grads)


def assert_the_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.allclose(got[0], want[0], rtol=1e-5), (got[0], want[0])
    assert torch.allclose(got[1], want[1], atol=2e-4 * want[1].abs().max().item())


def assert_trains_the_same(model: Any, batch: dict[str, Tensor]) -> None:
    """Patched here: without checkpoints, and with both forms of them."""
    want = numbers(model, batch)
    fastvlm.patch(model)
    assert_the_same(numbers(model, batch), want)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_the_same(numbers(model, batch), want)


def assert_writes_the_same(
    model: Any,
    inputs: dict[str, Tensor],
    cases: dict[str, dict[str, Any]],
    steps: list[Any],
    strict: bool = True,
) -> None:
    """Patched here: the same tokens, by steps that are written down. steps: the fixture."""
    expected = {case: generate(model, inputs, **settings) for case, settings in cases.items()}
    assert len({tuple(t.flatten().tolist()) for t in expected.values()}) > 2
    fastvlm.patch(model, strict=strict)
    for case, settings in cases.items():
        assert torch.equal(generate(model, inputs, **settings), expected[case]), case
    assert len(steps) >= 3
    assert None not in steps


def assert_adapted_is_the_same(
    build: Callable[[], nn.Module],
    adapted: Callable[[nn.Module], Any],
    inputs: dict[str, Tensor],
    batch: dict[str, Tensor],
    when: str,
) -> Any:
    """A model that is patched "before" its adapters come or "behind" them; that model. adapted:
    puts the same adapters into any of them."""
    plain = adapted(build()).eval()
    expected, want = generate(plain, inputs, num_beams=3), numbers(copy.deepcopy(plain), batch)
    model = build()
    if when == "before":
        fastvlm.patch(model)
    model = adapted(model).eval()
    if when == "behind":
        fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, num_beams=3), expected)
    assert_the_same(numbers(model, batch), want)
    return model
