"""What holds for every op, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastvlm
from fastvlm import Layout, ops

SEGMENTS = Layout.from_lengths([3, 0, 4])
READERS = Layout.from_lengths([2, 1, 3], [4, 2], [1, 0, 1])
FILLED = torch.tensor([4, 0, 3])
ANCESTRY = torch.tensor([[0, 2, -1, 0], [1, 1, 1, 1], [2, 0, 2, -1]], dtype=torch.int32)
LABELS = torch.tensor([1, -100, 6, 0])
ANGLE = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """An op as a function of float tensors only, and the shapes of those."""

    run: Callable[..., Any]
    shapes: list[tuple[int, ...]]
    dropout: Callable[..., Any] | None = None  # takes dropout_p as well


def _with_lse(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    out, lse = ops.self_attention(q, k, v, SEGMENTS, return_lse=True, **settings)
    return out + lse.unsqueeze(-1).to(out.dtype)


CASES = {
    "cross_attention": Case(
        lambda q, k, v: ops.cross_attention(q, k, v, READERS, softcap=5.0),
        [(6, 2, 4), (6, 1, 4), (6, 1, 4)],
        lambda q, k, v, **p: ops.cross_attention(q, k, v, READERS, **p),
    ),
    "self_attention": Case(
        lambda q, k, v: ops.self_attention(q, k, v, SEGMENTS, window=2),
        [(7, 2, 4), (7, 1, 4), (7, 1, 4)],
        lambda q, k, v, **p: ops.self_attention(q, k, v, SEGMENTS, window=3, **p),
    ),
    "position_bias": Case(
        lambda q, k, v, b: ops.self_attention(q, k, v, SEGMENTS, position_bias=b, softcap=5.0),
        [(7, 2, 4), (7, 1, 4), (7, 1, 4), (2, 5)],
        lambda q, k, v, b, **p: ops.self_attention(q, k, v, SEGMENTS, position_bias=b, **p),
    ),
    "cached_attention": Case(
        lambda q, k, v: ops.cached_attention(q, k, v, FILLED, ancestry=ANCESTRY, softcap=5.0),
        [(3, 2, 4), (3, 4, 1, 4), (3, 4, 1, 4)],
    ),
    "lse": Case(_with_lse, [(7, 2, 4), (7, 1, 4), (7, 1, 4)], _with_lse),
    "merge_attention": Case(ops.merge_attention, [(3, 2, 4), (3, 2), (3, 2, 4), (3, 2)]),
    "linear": Case(ops.linear, [(3, 5), (4, 5), (4,)]),
    "gelu_mlp": Case(
        ops.gelu_mlp,
        [(3, 5), (6, 5), (6,), (4, 6), (4,)],
        ops.gelu_mlp,
    ),
    "geglu_mlp": Case(ops.geglu_mlp, [(3, 5), (6, 5), (6, 5), (4, 6)]),
    "rms_norm": Case(ops.rms_norm, [(3, 5), (5,)]),
    "residual_rms_norm": Case(
        lambda x, r, w, g, n: ops.residual_rms_norm(x, r, w, gate=g, next_weight=n),
        [(3, 5), (3, 5), (5,), (1,), (5,)],
    ),
    "residual_layer_norm": Case(
        ops.residual_layer_norm,
        [(3, 5), (3, 5), (5,), (5,)],
        ops.residual_layer_norm,
    ),
    "rope": Case(lambda q, k: ops.rope(q, k, ANGLE.cos(), ANGLE.sin()), [(7, 4, 4), (7, 2, 4)]),
    "linear_cross_entropy": Case(
        lambda h, w, b: ops.linear_cross_entropy(h, w, LABELS, bias=b, softcap=3.0),
        [(4, 5), (9, 5), (9,)],
    ),
}
DIFFERENTIABLE_TWICE = {"linear", "cached_attention"}
DROPOUT = [name for name, case in CASES.items() if case.dropout]


@pytest.fixture(params=list(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def make(name: str, dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
    return [torch.randn(s, dtype=dtype, requires_grad=grad) for s in CASES[name].shapes]


def total(out: Any) -> Tensor:
    """One number that depends on every output, unevenly."""
    outs = out if isinstance(out, tuple) else (out,)
    return sum((o * torch.arange(1, o.numel() + 1).view(o.shape).to(o)).sum().sin() for o in outs)


def gradients(run: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor | None]:
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    total(run(*leaves)).backward()
    return [x.grad for x in leaves]


def test_gradcheck_of_the_reference(name: str) -> None:
    with fastvlm.use("reference"):
        assert torch.autograd.gradcheck(CASES[name].run, make(name, torch.float64))


def test_only_the_gradients_that_are_wanted(name: str) -> None:
    inputs = make(name)
    everything = gradients(CASES[name].run, inputs)
    for frozen in range(1, 2 ** len(inputs)):
        for i, x in enumerate(inputs):
            x.requires_grad_(not frozen >> i & 1)
        if not any(x.requires_grad for x in inputs):
            assert not any(o.requires_grad for o in _outs(CASES[name].run(*inputs)))
            continue
        for i, grad in enumerate(gradients(CASES[name].run, inputs)):
            if frozen >> i & 1:
                assert grad is None
            else:
                assert torch.equal(grad, everything[i])


def _outs(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def test_second_use_of_the_graph_gives_the_same(name: str) -> None:
    inputs = make(name)
    loss = total(CASES[name].run(*inputs))
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_second_derivative_works_or_is_refused(name: str) -> None:
    inputs = make(name, torch.float64)
    if name in DIFFERENTIABLE_TWICE:
        assert torch.autograd.gradgradcheck(CASES[name].run, inputs)
        return
    first = torch.autograd.grad(total(CASES[name].run(*inputs)), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="fastvlm: its ops have no second derivative"):
        sum(g.square().sum() for g in first).backward()
    # where what comes in is a constant, too: the gradient of a sum
    loss = sum(out.sum() for out in _outs(CASES[name].run(*inputs)))
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="fastvlm: its ops have no second derivative"):
        sum(g.square().sum() for g in first).backward()


def test_gradients_of_a_graph_that_goes_on_are_gradients(name: str) -> None:
    """Of create_graph=True, and they may be written into."""
    inputs = make(name)
    loss = total(CASES[name].run(*inputs))
    usual = torch.autograd.grad(loss, inputs, retain_graph=True)
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, usual))
    first[0].mul_(2)
    assert torch.equal(first[0], 2 * usual[0])


def test_two_runs_are_bit_identical(name: str) -> None:
    inputs = make(name)
    first, second = (_outs(CASES[name].run(*inputs)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    once, twice = (gradients(CASES[name].run, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_draws_the_same_dropout(name: str, reentrant: bool) -> None:
    case = CASES[name]
    run = partial(case.dropout, dropout_p=0.4) if case.dropout else case.run
    # float64: one backend serves with gradients and without, so results are equal to the bit
    inputs = make(name, torch.float64)
    torch.manual_seed(1)
    expected = gradients(run, inputs)
    torch.manual_seed(1)
    again = gradients(lambda *x: checkpoint(run, *x, use_reentrant=reentrant), inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, again))


def test_autocast(name: str) -> None:
    inputs = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        outs = _outs(CASES[name].run(*inputs))
    wide = {"rms_norm", "residual_rms_norm", "residual_layer_norm", "rope", "linear_cross_entropy"}
    wide.add("merge_attention")  # of what it is given
    assert all(o.dtype == (torch.float32 if name in wide else torch.bfloat16) for o in outs)
    total(outs if len(outs) > 1 else outs[0]).backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)


@pytest.mark.parametrize("name", DROPOUT)
def test_no_dropout_is_the_op_without_it(name: str) -> None:
    """dropout_p=0 gives the same to the bit, and leaves the generator alone."""
    run, inputs = CASES[name].dropout, make(name)
    assert run is not None
    before = torch.get_rng_state()
    assert torch.equal(run(*inputs, dropout_p=0.0), run(*inputs))
    assert torch.equal(torch.get_rng_state(), before)
    run(*inputs, dropout_p=0.1)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_is_a_function_of_the_generator(name: str) -> None:
    """One state gives one mask, forward and backward and on every run; the next call another."""
    run, inputs = CASES[name].dropout, make(name)
    assert run is not None
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append([run(*inputs, dropout_p=0.4).detach() for _ in range(2)])
        torch.manual_seed(5)
        results[-1] += gradients(partial(run, dropout_p=0.4), inputs)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not torch.equal(results[0][0], results[0][1])


def test_functional_call(name: str) -> None:
    class Module(torch.nn.Module):
        def __init__(self, weights: list[Tensor]) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(weights)

        def forward(self, x: Tensor) -> Any:
            return CASES[name].run(x, *self.weights)

    x, *weights = make(name)
    others = [torch.randn_like(w, requires_grad=True) for w in weights]
    named = {f"weights.{i}": w for i, w in enumerate(others)}
    total(torch.func.functional_call(Module(weights), named, (x,))).backward()
    want = gradients(CASES[name].run, [x, *others])
    assert all(torch.equal(a.grad, b) for a, b in zip([x, *others], want))


def test_nothing_is_recorded_without_gradients(name: str) -> None:
    inputs = make(name)
    with torch.no_grad():
        assert not any(o.requires_grad for o in _outs(CASES[name].run(*inputs)))
    with torch.inference_mode():
        CASES[name].run(*inputs)


def test_zero_stride_gradients(name: str) -> None:
    """sum().backward() hands down an expanded scalar."""
    inputs = make(name)
    sum(o.sum() for o in _outs(CASES[name].run(*inputs))).backward()
    dense = [x.detach().clone().requires_grad_() for x in inputs]
    outs = _outs(CASES[name].run(*dense))
    torch.autograd.backward(outs, [torch.ones(o.shape) for o in outs])
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(inputs, dense))
