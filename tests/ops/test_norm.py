"""rms_norm, residual_rms_norm and residual_layer_norm against plain PyTorch."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
from torch import Tensor

from fastvlm import ops

SHAPES = {"row": (1, 17), "rows": (3, 100), "batch": (2, 5, 768), "empty": (0, 63), "few": (4, 3)}


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """The norms have a kernel forward and backward on each."""
    return request.param


@pytest.mark.parametrize("offset", [1.0, 0.0])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_rms_norm(
    shape: str, offset: float, on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    n = SHAPES[shape][-1]
    follows_the_error_rule(
        lambda x, w: on(ops.rms_norm, x, w, offset=offset),
        lambda x, w: plain.rms_norm(x, w, offset=offset),
        [randn(*SHAPES[shape], grad=True), randn(n, scale=0.1, grad=True)],
    )


@pytest.mark.parametrize("next_norm", [True, False], ids=["next", "alone"])
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no-gate"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_residual_rms_norm(
    shape: str, gate: bool, next_norm: bool, on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    n = SHAPES[shape][-1]
    inputs = [
        randn(*SHAPES[shape], grad=True),
        randn(*SHAPES[shape], grad=True),
        randn(n, scale=0.1, grad=True),
        randn(1, grad=True) if gate else None,
        randn(n, scale=0.1, grad=True) if next_norm else None,
    ]
    follows_the_error_rule(
        lambda x, r, w, g, n: on(ops.residual_rms_norm, x, r, w, gate=g, next_weight=n),
        lambda *x: plain.residual_rms_norm(*x),
        inputs,
    )


@pytest.mark.parametrize("n", [1000, 2304])
def test_gradients_of_gates(n: int, on: Any, randn: Any, follows_the_error_rule: Any) -> None:
    follows_the_error_rule(
        plain.of_each_gate(
            lambda x, r, w, g, y: on(ops.residual_rms_norm, x, r, w, gate=g, next_weight=y)
        ),
        plain.of_each_gate(plain.residual_rms_norm),
        [
            randn(16, 2, n, grad=True),
            randn(16, 2, n),
            randn(n, scale=0.1, grad=True),
            randn(16, grad=True),
            randn(n, scale=0.1, grad=True),
        ],
    )


def test_a_closed_gate_passes_the_residual_and_still_learns() -> None:
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.zeros(8)
    gate = torch.zeros((), requires_grad=True)
    h = ops.residual_rms_norm(x, residual, weight, gate=gate)
    assert torch.equal(h, residual)
    h.sum().backward()
    assert gate.grad is not None
    assert gate.grad.shape == ()
    assert gate.grad != 0


@pytest.mark.parametrize("shape", list(SHAPES))
def test_residual_layer_norm(shape: str, on: Any, randn: Any, follows_the_error_rule: Any) -> None:
    n = SHAPES[shape][-1]
    follows_the_error_rule(
        lambda *x: on(ops.residual_layer_norm, *x),
        plain.residual_layer_norm,
        [
            randn(*SHAPES[shape], grad=True),
            randn(*SHAPES[shape], grad=True),
            randn(n, grad=True),
            randn(n, grad=True),
        ],
    )


def test_only_one_of_two_outputs_is_used() -> None:
    """h alone, or y alone: the gradient that is missing counts as zero."""
    shapes = [(2, 6), (2, 6), (6,)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    following = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for which in (0, 1):
        assert torch.autograd.gradcheck(
            lambda x, r, w, n, which=which: ops.residual_rms_norm(x, r, w, next_weight=n)[which],
            [*inputs, following],
        )


def test_dtypes_may_differ_as_under_autocast() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.bfloat16), torch.randn(8)
    assert ops.rms_norm(x, weight).dtype == torch.bfloat16
    h = ops.residual_rms_norm(x, torch.randn(3, 8), weight)
    assert isinstance(h, Tensor)
    assert h.dtype == torch.float32


def test_the_offset_is_added_in_float32() -> None:
    """In bfloat16 1 + 0.001 is 1: the weight would be lost (it is 0.1 % of the result)."""
    x = torch.full((1, 8), 512.0, dtype=torch.bfloat16)
    weight = torch.full((8,), 0.006, dtype=torch.bfloat16)
    wide = ops.rms_norm(x.float(), weight.float())
    assert torch.equal(ops.rms_norm(x, weight), wide.bfloat16())


def test_dropout_rate_scale_and_one_mask_for_both_directions() -> None:
    p, rows = 0.3, 400
    residual, weight, bias = torch.zeros(rows, 64), torch.ones(64), torch.zeros(64)
    # a constant row normalizes to zero where nothing is dropped; count the dropped by their value
    out = ops.residual_layer_norm(torch.ones(rows, 64), residual, weight, bias, dropout_p=p)
    gone = (out < 0).double().mean().item()
    assert abs(gone - p) < 5 * (p * (1 - p) / out.numel()) ** 0.5
    shapes = [(3, 5), (3, 5), (5,), (5,)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def fixed(*x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return ops.residual_layer_norm(*x, dropout_p=p)

    assert torch.autograd.gradcheck(fixed, inputs)
