"""The activations that the MLP ops have besides GELU, on every floor."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
from torch import Tensor

from fastvlm import ops
from fastvlm.cuda import mlp as cuda_mlp
from fastvlm.reference.mlp import ACTIVATIONS
from fastvlm.triton import mlp as triton_mlp

OTHERS = pytest.mark.parametrize("activation", ["relu", "silu"])
# rows, input, hidden, output; "many" are more than our kernels stream
SHAPES = {"seven": (7, 300, 100, 77), "many": (130, 63, 100, 64), "empty": (0, 17, 3, 5)}


@OTHERS
@pytest.mark.parametrize("grad", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_error_rule(
    shape: str, grad: bool, activation: str, randn: Any, follows_the_error_rule: Any
) -> None:
    m, k, f, n = SHAPES[shape]
    x, b1, b2 = randn(m, k, grad=grad), randn(f, grad=grad), randn(n, grad=grad)
    w1, up = (randn(f, k, scale=k**-0.5, grad=grad) for _ in range(2))
    w2 = randn(n, f, scale=f**-0.5, grad=grad)
    follows_the_error_rule(
        lambda *x: ops.gelu_mlp(*x, activation=activation),
        lambda *x: plain.gelu_mlp(*x, activation),
        [x, w1, b1, w2, b2],
    )
    follows_the_error_rule(
        lambda *x: ops.geglu_mlp(*x, activation=activation),
        lambda *x: plain.geglu_mlp(*x, activation),
        [x, w1, up, w2],
    )
    if not grad:
        follows_the_error_rule(
            lambda *x: ops.residual_gelu_mlp(*x, activation=activation),
            lambda *x: x[-1] + plain.gelu_mlp(*x[:-1], activation),
            [x, w1, b1, w2, b2, randn(m, n)],
        )


ENDS = [0.0, -0.0, 1e30, -1e30, 3e38, 100.0, -100.0, 88.5, -88.5]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("backend", ["reference", "default"])
@OTHERS
def test_over_its_whole_range(activation: str, backend: str, monkeypatch: Any) -> None:
    """The identity as weights shows the activation and its slope alone: at 0, and at both ends."""
    if backend == "reference":
        monkeypatch.setattr(ops.dispatch, "_forced", "reference")
    line = torch.cat([torch.linspace(-30, 30, 4001), torch.logspace(-20, 1, 95)])
    x, one = torch.cat([line, torch.tensor(ENDS)]), torch.ones(1, 1)

    def ours(x: Tensor) -> Tensor:
        return ops.gelu_mlp(x[:, None], one, None, one, None, activation=activation)[:, 0]

    def exact(x: Tensor) -> Tensor:
        return plain.activated(x, activation)

    def slope(x: Tensor, function: Any) -> Tensor:
        x = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(function(x).sum(), x)
        return found

    for rows in (x, torch.tensor(ENDS)):  # as many, and as few
        for got, theirs, right in (
            (ours(rows), exact(rows), exact(rows.double())),
            (slope(rows, ours), slope(rows, exact), slope(rows.double(), exact)),
        ):
            small = right.abs() < 1e-30  # where exp() is next to the smallest numbers
            assert (got[small].double() - right[small]).abs().max() <= 1e-30
            error, allowed = ((y.double() / right - 1).abs()[~small].max() for y in (got, theirs))
            assert error <= 2 * allowed + 4 * torch.finfo(x.dtype).eps
    for odd in (torch.tensor([NAN, INF]), torch.tensor([NAN, INF] * 50)):
        assert torch.equal(ours(odd).isnan(), odd.isnan())
        assert ours(odd)[1] == INF


def test_an_older_name() -> None:
    x, w1, w2, r = torch.randn(3, 5), torch.randn(6, 5), torch.randn(4, 6), torch.randn(3, 4)
    for older, name in (("none", "gelu"), ("tanh", "gelu_tanh")):
        for run in (
            lambda **kind: ops.gelu_mlp(x, w1, None, w2, None, **kind),
            lambda **kind: ops.geglu_mlp(x, w1, w1, w2, **kind),
            lambda **kind: ops.residual_gelu_mlp(x, w1, None, w2, None, r, **kind),
        ):
            assert torch.equal(run(approximate=older), run(activation=name))
            assert not torch.equal(run(approximate=older), run(activation="relu"))


@OTHERS
def test_kernels_without_it_say_so(activation: str) -> None:
    """Dispatch then leaves them out, and the reference serves."""
    number = ACTIVATIONS.index(activation)
    x, w1, w2 = torch.randn(3, 8), torch.randn(16, 8), torch.randn(8, 16)
    hidden = torch.randn(3, 16)
    calls: dict[str, tuple[Any, ...]] = {
        "gelu_mlp": (x, w1, None, w2, None, None, number, 0.0, False),
        "gelu_mlp_backward": (x, x, hidden, w1, w2, None, number, 0.0, [True] * 5),
        "geglu_mlp": (x, w1, w1, w2, number, False),
        "geglu_mlp_backward": (x, x, hidden, hidden, w1, w1, w2, number, [True] * 4),
        "low_precision_hidden": (x, w1, None, None, None, None, number),
    }
    for backend in (cuda_mlp, triton_mlp):
        served = backend.LAUNCHERS.keys() & calls.keys()
        assert len(served) > 2
        for name in served:
            why = backend.LAUNCHERS[name].unsupported(*calls[name])
            assert why == f"{activation} (it has gelu and gelu_tanh)"
