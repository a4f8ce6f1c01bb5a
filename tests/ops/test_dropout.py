"""Dropout of attention probabilities: which elements a mask covers, and that backward agrees.

What holds for dropout in every op (no rate is no dropout, the generator decides, checkpointing)
stands in test_contract.py; rate and scale stand with each op.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastvlm import Layout, ops

P = 0.3
READERS = Layout.from_lengths([3, 0, 4, 2], [5, 6, 4], [1, 0, 0, 1])
SEGMENTS = Layout.from_lengths([3, 0, 5])


def cross(q: Tensor, k: Tensor, v: Tensor, p: float = P) -> Tensor:
    return ops.cross_attention(q, k, v, READERS, softcap=4.0, dropout_p=p)


def own(q: Tensor, k: Tensor, v: Tensor, p: float = P) -> Tensor:
    return ops.self_attention(q, k, v, SEGMENTS, window=3, softcap=4.0, dropout_p=p)


RUNS = {"cross": (cross, 9, 15), "self": (own, 8, 8)}


def fixed(run: Any, *inputs: Tensor) -> Tensor:
    torch.manual_seed(3)
    return run(*inputs)


@pytest.mark.parametrize("kind", list(RUNS))
def test_backward_uses_the_mask_of_forward(kind: str) -> None:
    """Under a fixed seed the op is an ordinary function: its gradient is the difference."""
    run, rows, keys = RUNS[kind]
    shapes = [(rows, 2, 3), (keys, 1, 3), (keys, 1, 3)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *x: fixed(run, *x), inputs)


@pytest.mark.parametrize("kind", list(RUNS))
def test_gradient_of_v_is_the_dropped_matrix(kind: str, dtype: torch.dtype) -> None:
    """The output is linear in v: out . g = v . dv, exactly the same mask on both sides."""
    run, rows, keys = RUNS[kind]
    q, k = torch.randn(rows, 4, 8).to(dtype), torch.randn(keys, 2, 8).to(dtype)
    # one non-zero row of v at a time, so no sum hides a wrong element
    v = torch.zeros(keys, 2, 1, dtype=dtype, requires_grad=True)
    grad = torch.autograd.grad(fixed(run, q, k, v).sum(), v)[0]
    for key in range(keys):
        one = torch.zeros_like(v)
        one[key] = 1
        column = fixed(run, q, k, one.detach()).double().sum((0, 2)).view(2, 2).sum(1)
        bound = 2 * rows * torch.finfo(dtype).eps * column.abs().max()
        assert (grad[key, :, 0].double() - column).abs().max() <= bound


def test_masks_differ_between_heads_rows_images_and_calls() -> None:
    """The dropped probabilities of equal scores, as a mask [rows, heads, keys] of each image."""
    layout = Layout.from_lengths([40, 40], [50, 50], [0, 1])
    q, k = torch.zeros(80, 2, 4), torch.zeros(100, 2, 4)
    v = torch.eye(50).repeat(2, 1).unsqueeze(1).expand(-1, 2, -1)

    def masks() -> list[Tensor]:
        kept = ops.cross_attention(q, k, v, layout, dropout_p=P) != 0
        return [*kept[:40].unbind(1), *kept[40:].unbind(1)]

    found = masks() + masks()
    found += [mask.roll(1, 0) for mask in found]
    # two independent masks agree in P^2 + (1-P)^2 of their elements
    agree, count = P * P + (1 - P) ** 2, found[0].numel()
    for i, a in enumerate(found):
        for b in found[:i]:
            share = (a == b).double().mean().item()
            assert abs(share - agree) < 5 * (agree * (1 - agree) / count) ** 0.5


@pytest.mark.parametrize("kind", list(RUNS))
def test_the_mean_over_masks_is_the_output_without(kind: str) -> None:
    run, rows, keys = RUNS[kind]
    q, k, v = (torch.randn(n, 2, 4).double() for n in (rows, keys, keys))
    draws = torch.stack([run(q, k, v) for _ in range(400)])
    wanted = run(q, k, v, 0.0)
    # five standard errors, and where nothing varies (one key, or none) only rounding
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - wanted).abs() <= 5 * error + 1e-12).all()
