"""What holds for every op, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastvlm
from fastvlm import Layout, ops

SEGMENTS = Layout.from_lengths([3, 0, 4])
READERS = Layout.from_lengths([2, 1, 3], [4, 2], [1, 0, 1])
LABELS = torch.tensor([1, -100, 6, 0])
ANGLE = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """An op as a function of float tensors only, and the shapes of those."""

    run: Callable[..., Any]
    shapes: list[tuple[int, ...]]
    dropout: Callable[..., Any] | None = None


CASES = {
    "cross_attention": Case(
        lambda q, k, v: ops.cross_attention(q, k, v, READERS, softcap=5.0),
        [(6, 4, 8), (6, 2, 8), (6, 2, 8)],
        lambda q, k, v: ops.cross_attention(q, k, v, READERS, dropout_p=0.4),
    ),
    "self_attention": Case(
        lambda q, k, v: ops.self_attention(q, k, v, SEGMENTS, window=2),
        [(7, 4, 8), (7, 2, 8), (7, 2, 8)],
        lambda q, k, v: ops.self_attention(q, k, v, SEGMENTS, dropout_p=0.4),
    ),
    "linear": Case(ops.linear, [(3, 5), (4, 5), (4,)]),
    "gelu_mlp": Case(
        ops.gelu_mlp,
        [(3, 5), (6, 5), (6,), (4, 6), (4,)],
        lambda *x: ops.gelu_mlp(*x, dropout_p=0.4),
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
        lambda *x: ops.residual_layer_norm(*x, dropout_p=0.4),
    ),
    "rope": Case(lambda q, k: ops.rope(q, k, ANGLE.cos(), ANGLE.sin()), [(7, 4, 4), (7, 2, 4)]),
    "linear_cross_entropy": Case(
        lambda h, w, b: ops.linear_cross_entropy(h, w, LABELS, bias=b, softcap=3.0),
        [(4, 5), (9, 5), (9,)],
    ),
}
DIFFERENTIABLE_TWICE = {"linear"}


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
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in first).backward()


def test_two_runs_are_bit_identical(name: str) -> None:
    inputs = make(name)
    first, second = (_outs(CASES[name].run(*inputs)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    once, twice = (gradients(CASES[name].run, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_draws_the_same_dropout(name: str, reentrant: bool) -> None:
    run = CASES[name].dropout or CASES[name].run
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
    assert all(o.dtype == (torch.float32 if name in wide else torch.bfloat16) for o in outs)
    total(outs if len(outs) > 1 else outs[0]).backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)


def test_zero_stride_gradients(name: str) -> None:
    """sum().backward() hands down an expanded scalar."""
    inputs = make(name)
    sum(o.sum() for o in _outs(CASES[name].run(*inputs))).backward()
    dense = [x.detach().clone().requires_grad_() for x in inputs]
    outs = _outs(CASES[name].run(*dense))
    torch.autograd.backward(outs, [torch.ones(o.shape) for o in outs])
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(inputs, dense))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    inputs = make(name)
    compiled = torch.compile(CASES[name].run, fullgraph=True, dynamic=dynamic)
    for got, want in zip(_outs(compiled(*inputs)), _outs(CASES[name].run(*inputs))):
        assert torch.allclose(got, want, atol=1e-5)
    for got, want in zip(gradients(compiled, inputs), gradients(CASES[name].run, inputs)):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


def _schema_arguments() -> dict[str, tuple[Any, ...]]:
    """Arguments for every schema, forward and backward."""

    def t(*shape: int) -> Tensor:
        return torch.randn(shape)

    offsets = (READERS.q_offsets, READERS.kv_offsets, READERS.image_of)
    rest = (None, READERS.max_q, READERS.max_kv, False, 0, 0.3, 5.0, 0.0)
    own = (SEGMENTS.q_offsets, SEGMENTS.kv_offsets, SEGMENTS.image_of)
    own_rest = (torch.tensor([7]), SEGMENTS.max_q, SEGMENTS.max_kv, True, 2, 0.3, 0.0, 0.1)
    read = (t(6, 4, 8), t(6, 2, 8), t(6, 2, 8))
    packed = (t(7, 4, 8), t(7, 2, 8), t(7, 2, 8))
    some = [True, False, True]
    mlp = (t(3, 5), t(6, 5), t(6), t(4, 6), t(4))
    gated = (t(6, 5), t(6, 5), t(4, 6))
    head = (t(4, 5), t(9, 5), LABELS, t(9))
    back = (t(6, 4, 8), *read, t(6, 4, 8), t(6, 4))
    own_back = (t(7, 4, 8), *packed, t(7, 4, 8), t(7, 4))
    tables = (ANGLE.cos(), ANGLE.sin())
    norm = (t(3, 5), t(3, 5), t(5), t(1), t(5))
    return {
        "cross_attention": (*read, *offsets, *rest),
        "cross_attention_backward": (*back, *offsets, *rest, some),
        "self_attention": (*packed, *own, *own_rest),
        "self_attention_backward": (*own_back, *own, *own_rest, some),
        "cached_attention": (
            *(t(3, 4, 8), t(3, 6, 2, 8), t(3, 6, 2, 8)),
            *(torch.tensor([1, 6, 3], dtype=torch.int32), None, 0, 0.3, 0.0),
        ),
        "linear": (mlp[0], mlp[1], mlp[2]),
        "gelu_mlp": (*mlp, None, False, 0.0, True),
        "gelu_mlp_backward": (
            *(t(3, 4), mlp[0], t(3, 6), mlp[1], mlp[3], None, False, 0.0),
            [True, False, True, True, False],
        ),
        "geglu_mlp": (mlp[0], *gated, True, False),
        "geglu_mlp_backward": (
            *(t(3, 4), mlp[0], t(3, 6), t(3, 6), *gated, True),
            [True, True, False, True],
        ),
        "rms_norm": (t(3, 5), t(5), 1e-6, 1.0),
        "rms_norm_backward": (t(3, 5), t(3, 5), t(5), 1e-6, 1.0, [True, False]),
        "residual_rms_norm": (*norm, 1e-6, 1.0),
        "residual_rms_norm_backward": (
            *(t(3, 5), t(3, 5), *norm, 1e-6, 1.0),
            [True, True, False, True, True],
        ),
        "residual_layer_norm": (t(3, 5), t(3, 5), t(5), t(5), None, 1e-5, 0.0),
        "residual_layer_norm_backward": (
            *(t(3, 5), t(3, 5), t(3, 5), t(5), None, 1e-5, 0.0),
            [True, False, True, True],
        ),
        "rope": (t(7, 4, 4), t(7, 2, 4), *tables),
        "rope_backward": (t(7, 4, 4), t(7, 2, 4), *tables),
        "linear_cross_entropy": (*head, 3.0, -100),
        "linear_cross_entropy_backward": (t(4), *head, t(4), 3.0, -100, some),
        "linear_topk": (head[0], head[1], 3, head[3], 3.0),
    }


def test_every_schema_has_arguments_here() -> None:
    public = set(fastvlm.ops.dispatch.OPS) - {"scratch_for_tests"}
    assert set(_schema_arguments()) == public


@pytest.mark.parametrize("schema", list(_schema_arguments()))
def test_opcheck(schema: str) -> None:
    """The schema tells the truth, and the fake agrees with the real thing."""
    op = getattr(torch.ops.fastvlm, schema).default
    torch.library.opcheck(
        op, _schema_arguments()[schema], test_utils=("test_schema", "test_faketensor")
    )
    for backend in ("reference", "default"):
        if backend == "reference":
            with fastvlm.use("reference"):
                real = op(*_schema_arguments()[schema])
        else:
            real = op(*_schema_arguments()[schema])
        assert all(isinstance(o, Tensor) for o in _outs(real))
