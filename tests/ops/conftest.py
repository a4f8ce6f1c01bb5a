from __future__ import annotations

from collections.abc import Callable
from typing import Any

import error_rule
import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def poisoned(poison: None) -> None:
    """Every test of an op runs on poisoned memory."""


def _leaf(x: Any, dtype: torch.dtype | None) -> Any:
    """A leaf with the values and strides of x."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    copy = x.detach() if dtype is None else x.detach().to(dtype)
    return copy.requires_grad_(x.requires_grad)


def _run(
    function: Callable[..., Any], inputs: list[Any], dtype: torch.dtype | None, grads: list[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    leaves = [_leaf(x, dtype) for x in inputs]
    out = function(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    wants = [o for o in outs if o.requires_grad]
    if wants:
        if not grads:
            grads.extend(torch.randn(o.shape).to(o.dtype) for o in wants)
        given = [g.to(o.device, o.dtype, copy=True) for g, o in zip(grads, wants)]
        torch.autograd.backward(wants, given)
        assert all(torch.equal(g, was.to(g)) for g, was in zip(given, grads)), (
            "a gradient was modified on its way in"
        )
    return [o.detach() for o in outs], [getattr(x, "grad", None) for x in leaves]


def _beside(x: Any) -> Any:
    """Numbers a hundredth to either side; zeros stay."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    beside = x.detach() * (1 + 0.01 * torch.randn_like(x))
    return beside.requires_grad_(x.requires_grad)


@pytest.fixture
def follows_the_error_rule() -> Callable[..., None]:
    """Forward and backward of an op against plain PyTorch in the same dtype and in float64.

    ours and plain take the same inputs; a gradient is checked for each input that requires one.
    """

    def results(
        ours: Callable[..., Any], plain: Callable[..., Any], inputs: list[Any]
    ) -> dict[str, tuple[error_rule.Results, float]]:
        grads: list[Tensor] = []
        got, got_grads = _run(ours, inputs, None, grads)
        theirs, their_grads = _run(plain, inputs, None, grads)
        exact, exact_grads = _run(plain, inputs, torch.float64, grads)
        found = {}
        for i, each in enumerate(zip(got, theirs, exact, strict=True)):
            found[f"output {i}"] = each, error_rule.FORWARD
        for i, (a, b, c) in enumerate(zip(got_grads, their_grads, exact_grads, strict=True)):
            assert (a is None) == (c is None), f"gradient of input {i}"
            if a is not None and b is not None and c is not None:
                found[f"gradient of input {i}"] = (a, b, c), error_rule.BACKWARD
        return found

    def check(ours: Callable[..., Any], plain: Callable[..., Any], inputs: list[Any]) -> None:
        before = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
        draws = [results(ours, plain, inputs)]

        def broken() -> dict[str, str]:
            """Judged by the worst of all draws: with one of a few numbers PyTorch may be lucky."""
            wrong = {
                name: error_rule.breach([draw[name][0] for draw in draws], factor)
                for name, (_, factor) in draws[0].items()
            }
            return {name: how for name, how in wrong.items() if how is not None}

        while broken() and len(draws) < error_rule.DRAWS:
            draws.append(results(ours, plain, [_beside(x) for x in inputs]))
        error_rule.refuse(broken())
        for x, was in zip(inputs, before):
            assert not isinstance(x, Tensor) or torch.equal(x, was), "an input was modified"

    return check
