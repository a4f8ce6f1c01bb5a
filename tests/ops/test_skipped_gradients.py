"""linear_cross_entropy(skip_tiny_gradients=...): what is left out, and no more than may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import error_rule
import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm import ops
from fastvlm.ops.loss import _skip_below

ROWS, WIDTH, VOCABULARY = 37, 24, 577
# what rounding of logits to float32 may do to a probability
ROUNDING = 1e-3


def head(kind: str, randn: Any) -> tuple[Tensor, Tensor, Tensor]:
    """peaked: some tokens near 1 each, most near 0. mixed: all sizes. flat: all about 1 / V."""
    h = randn(ROWS, WIDTH, scale={"peaked": 8.0, "mixed": 1.0, "flat": 0.01}[kind], grad=True)
    weight = randn(VOCABULARY, WIDTH, grad=True)
    labels = torch.randint(0, VOCABULARY, (ROWS,)).masked_fill(torch.rand(ROWS) < 0.3, -100)
    labels[0], labels[-1] = VOCABULARY - 1, 0
    return h, weight, labels


def dlogits_of(
    h: Tensor, weight: Tensor, labels: Tensor, grad: Tensor, bias: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits in float64, and which are their labels' own. grad: [T]."""
    logits = F.linear(h.double(), weight.double(), None if bias is None else bias.double())
    slope = torch.ones_like(logits)
    if softcap > 0:
        t = torch.tanh(logits / softcap)
        logits, slope = softcap * t, 1 - t * t
    own = labels[:, None] == torch.arange(weight.shape[0])
    grad = grad.double().masked_fill(labels == -100, 0)[:, None]
    return (logits.softmax(-1) - own.double()) * slope * grad, own


def check_bound(
    run: Callable[..., Tensor],
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    skip: bool | float,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> list[Tensor]:
    """Gradients of h, weight and bias, each element within what may be left out, and rounding.

    run(h, weight, labels, **settings) gives the loss of each row.
    """
    leaves = [x.detach().clone().requires_grad_() for x in (h, weight, bias) if x is not None]
    given = {"bias": leaves[2] if bias is not None else None, "softcap": softcap}
    grad = torch.rand(ROWS) + 0.1
    loss = run(*leaves[:2], labels, **given, reduction="none", skip_tiny_gradients=skip)
    got = torch.autograd.grad(loss, leaves, grad)
    theirs, exact = (
        torch.autograd.grad(
            plain.linear_cross_entropy(
                *x[:2], labels, x[2] if bias is not None else None, softcap, "none"
            ),
            x,
            grad.to(torch.float64 if wide else torch.float32),
        )
        for wide in (False, True)
        for x in [
            [y.detach().to(torch.float64 if wide else y.dtype).requires_grad_() for y in leaves]
        ]
    )
    d, own = dlogits_of(h, weight, labels, grad, bias, softcap or 0.0)
    tiny = d.abs() <= _skip_below("", skip, h.dtype) * (1 + ROUNDING) * grad.double()[:, None]
    left_out = torch.where(tiny & ~own, d.abs(), 0.0)
    allowed = [left_out @ weight.double().abs(), left_out.t() @ h.double().abs(), torch.zeros(1)]
    for name, a, b, c, may in zip(("h", "weight", "bias"), got, theirs, exact, allowed):
        assert a.isfinite().all(), f"gradient of {name}: NaN or infinity"
        off = (a.double() - c).abs()
        # of the error rule, for each element
        rounding = error_rule.BACKWARD * (b.double() - c).abs().max()
        rounding += 2 * torch.finfo(a.dtype).eps * c.abs().max()
        excess = (off - may - rounding).max()
        assert excess <= 0, f"gradient of {name}: {excess:.3e} beyond what may be left out"
    return list(got)


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["nocap", "cap"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("skip", [True, 0.01], ids=["by-dtype", "hundredth"])
@pytest.mark.parametrize("kind", ["peaked", "mixed", "flat"])
def test_the_bound(
    kind: str, skip: bool | float, bias: bool, softcap: float | None, on: Any, randn: Any
) -> None:
    h, weight, labels = head(kind, randn)
    b = randn(VOCABULARY) if bias else None

    def run(*args: Any, **kw: Any) -> Tensor:
        return on(ops.linear_cross_entropy, *args, **kw)

    check_bound(run, h, weight, labels, skip, b, softcap)


def test_a_bound_that_is_too_small_is_noticed(randn: Any) -> None:
    """The check above against gradients from which more was left out than was said."""
    h, weight, labels = head("mixed", randn)

    def run(h: Tensor, weight: Tensor, labels: Tensor, **kw: Any) -> Tensor:
        kw["skip_tiny_gradients"] = 0.05
        return ops.linear_cross_entropy(h, weight, labels, **kw)  # type: ignore[return-value]

    with pytest.raises(AssertionError, match="beyond what may be left out"):
        check_bound(run, h, weight, labels, 1e-4)


def test_the_loss_stays_and_false_is_exact(backend: str, on: Any, randn: Any) -> None:
    h, weight, labels = head("peaked", randn)
    groups = torch.arange(ROWS) % 3

    def both(skip: bool | float) -> tuple[Tensor, ...]:
        loss, sums, counts = on(
            ops.linear_cross_entropy, h, weight, labels, groups=groups, num_groups=3,
            skip_tiny_gradients=skip,
        )  # fmt: skip
        total = loss + (sums * torch.tensor([1.0, 0.0, 2.0])).sum()
        return loss, sums, counts, *torch.autograd.grad(total, (h, weight))

    plainly, none, some = both(False), both(0.0), both(0.02)
    assert all(torch.equal(a, b) for a, b in zip(plainly, none, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plainly[:3], some[:3]))
    skips = backend != "reference"
    assert torch.equal(plainly[3], some[3]) != skips
    assert torch.equal(plainly[4], some[4]) != skips


def test_a_flat_softmax_leaves_the_labels(on: Any, backend: str, randn: Any) -> None:
    """The docstring's warning: a token that is no label learns nothing."""
    if backend == "reference":
        pytest.skip("it leaves nothing out")
    h, weight, labels = head("flat", randn)
    labels = torch.where(labels > 60, labels % 60, labels)
    loss = on(ops.linear_cross_entropy, h, weight, labels, skip_tiny_gradients=0.01)
    (dw,) = torch.autograd.grad(loss, (weight,))
    counted = labels[labels >= 0]
    far = torch.ones(VOCABULARY, dtype=torch.bool)
    for label in counted.tolist():  # a block of the kernels: 32 tokens
        far[max(0, label - 31) : label + 32] = False
    assert far.any()
    assert dw[far].abs().max() == 0
    assert (dw[counted].abs().amax(1) > 0).all()


def test_a_frozen_weight(on: Any, randn: Any) -> None:
    h, weight, labels = head("peaked", randn)

    def dh(w: Tensor) -> Tensor:
        loss = on(ops.linear_cross_entropy, h, w, labels, skip_tiny_gradients=True)
        return torch.autograd.grad(loss, (h,))[0]

    assert torch.equal(dh(weight), dh(weight.detach()))


def test_what_is_no_number_is_not_tiny(on: Any, randn: Any) -> None:
    """A row that went wrong shows, as without skipping."""
    h, weight, labels = head("peaked", randn)
    with torch.no_grad():
        h[0, 0] = float("nan")
    loss = on(ops.linear_cross_entropy, h, weight, labels, skip_tiny_gradients=0.1)
    dh, dw = torch.autograd.grad(loss, (h, weight))
    assert dh[0].isnan().all()
    assert dw.isnan().all()
    assert dh[1:].isfinite().all()


def test_thresholds() -> None:
    below = {d: _skip_below("", True, d) for d in (torch.bfloat16, torch.float16, torch.float32)}
    assert list(below.values()) == [2.0**-12, 2.0**-15, 2.0**-28]
    assert _skip_below("", False, torch.float32) == 0.0
    assert _skip_below("", 0.25, torch.float32) == 0.25
