"""Every schema tells the truth, its fake agrees with the real thing, and every op compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_contract import (
    ANGLE,
    CASES,
    LABELS,
    READERS,
    SEGMENTS,
    _outs,
    gradients,
    make,
    total,
)
from torch import Tensor

import fastvlm
from fastvlm import Layout, ops
from fastvlm.ops.attention import arguments_of


def _schema_arguments() -> dict[str, tuple[Any, ...]]:
    """Arguments for every schema, forward and backward."""

    def t(*shape: int) -> Tensor:
        return torch.randn(shape)

    where, settings = arguments_of(READERS), (False, 0, 0.3, 5.0, 0.0)
    own, own_settings = arguments_of(SEGMENTS, torch.tensor([7])), (True, 2, 0.3, 0.0, 0.1)
    read = (t(6, 4, 8), t(6, 2, 8), t(6, 2, 8))
    packed = (t(7, 4, 8), t(7, 2, 8), t(7, 2, 8))
    some = [True, False, True]
    mlp = (t(3, 5), t(6, 5), t(6), t(4, 6), t(4))
    gated = (t(6, 5), t(6, 5), t(4, 6))
    head = (t(4, 5), t(9, 5), LABELS, t(9))
    back = (t(6, 4, 8), *read, t(6, 4, 8), t(6, 4, 2))
    own_back = (t(7, 4, 8), *packed, t(7, 4, 8), t(7, 4, 2))
    tables = (ANGLE.cos(), ANGLE.sin())
    norm = (t(3, 5), t(3, 5), t(5), t(1), t(5))
    return {
        "cross_attention": (*read, *where, *settings),
        "cross_attention_backward": (*back, *where, *settings, some),
        "self_attention": (*packed, *own, *own_settings, t(4, 5)),
        "self_attention_backward": (*own_back, *own, *own_settings, some),
        "cached_attention": (
            *(t(3, 4, 8), t(3, 6, 2, 8), t(3, 6, 2, 8)),
            *(torch.tensor([1, 6, 3], dtype=torch.int32), None, 0, 0.3, 0.0),
        ),
        "cached_attention_lse": (
            *(t(3, 4, 8), t(3, 6, 2, 8), t(3, 6, 2, 8)),
            *(torch.tensor([1, 6, 3], dtype=torch.int32), None, 0, 0.3, 0.0),
        ),
        "merge_attention": (t(3, 4, 8), t(3, 4), t(3, 4, 8), t(3, 4)),
        "merge_attention_backward": (t(3, 4, 8), t(3, 4, 8), t(3, 4), t(3, 4, 8), t(3, 4)),
        "linear": (mlp[0], mlp[1], mlp[2]),
        "low_precision_linear": (mlp[0], *ops.quantize_rows(mlp[1]), mlp[2]),
        "low_precision_hidden": (
            *(mlp[0], *ops.quantize_rows(mlp[1]), None, *ops.quantize_rows(mlp[1]), 3),
        ),
        "int8_linear": (mlp[0], *ops.quantize_rows(mlp[1]), mlp[2], t(3, 6), torch.ones(3)),
        "int8_gelu_mlp": (
            *(mlp[0], *ops.quantize_rows(mlp[1]), mlp[2], *ops.quantize_rows(mlp[3]), mlp[4]),
            *(None, None, 2),
        ),
        "bf16_linear": (mlp[0], mlp[1].bfloat16(), None, mlp[2], t(3, 6), torch.ones(3)),
        "bf16_gelu_mlp": (
            *(mlp[0], mlp[1].bfloat16(), None, mlp[2], *ops.quantize_rows(mlp[3]), mlp[4]),
            *(None, None, 2),
        ),
        "gelu_mlp": (*mlp, None, 2, 0.0, True),
        "gelu_mlp_backward": (
            *(t(3, 4), mlp[0], t(3, 6), mlp[1], mlp[3], None, 3, 0.0),
            [True, False, True, True, False],
        ),
        "geglu_mlp": (mlp[0], *gated, 1, False),
        "geglu_mlp_backward": (
            *(t(3, 4), mlp[0], t(3, 6), t(3, 6), *gated, 3),
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
        "residual_linear": (t(4, 5), t(6, 5), t(6), t(4, 6), torch.ones(2)),
        "residual_gelu_mlp": (*(t(3, 5), t(6, 5), t(6), t(4, 6), t(4), t(3, 4), torch.ones(3), 1),),
        "window_attention": (t(2, 3, 5, 24), t(24), 2, 2, 0.3),
        "channel_attention": (t(2, 5, 24), 2),
        "depthwise_conv_norm": (*(t(2, 3, 5, 8), t(8, 9), t(8), t(8), t(8), 1e-5, torch.bfloat16),),
        "rope": (t(7, 4, 4), t(7, 2, 4), *tables),
        "rope_backward": (t(7, 4, 4), t(7, 2, 4), *tables),
        "linear_cross_entropy": (*head, 3.0, -100),
        "linear_cross_entropy_backward": (t(4), *head, t(4, 2), 3.0, -100, 0.01, some),
        "linear_topk": (head[0], head[1], 3, head[3], 3.0),
    }


def test_every_schema_has_arguments_here() -> None:
    public = set(fastvlm.ops.dispatch.OPS) - {"scratch_for_tests"}
    assert set(_schema_arguments()) == public


def _column_major(x: Any) -> Any:
    """The same values, the last dimension not the dense one; weights and tables of one row stay."""
    many = isinstance(x, Tensor) and x.dim() >= 2
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if many else x


def _every_second_row(x: Any) -> Any:
    many = isinstance(x, Tensor) and x.dim() >= 2
    return x.repeat_interleave(2, 0)[::2] if many else x


STRIDES: dict[str, Callable[[Any], Any]] = {
    "dense": lambda x: x,
    "column-major": _column_major,
    "every-second-row": _every_second_row,
}


@pytest.mark.parametrize("strides", list(STRIDES))
@pytest.mark.parametrize("backend", ["reference", "default"])
@pytest.mark.parametrize("schema", list(_schema_arguments()))
def test_opcheck(schema: str, backend: str, strides: str) -> None:
    """No argument is modified or returned, and the fake has the shapes, dtypes and strides."""
    op = getattr(torch.ops.fastvlm, schema).default
    arguments = tuple(STRIDES[strides](a) for a in _schema_arguments()[schema])
    utilities = ("test_schema", "test_faketensor")
    if backend == "reference":
        with fastvlm.use("reference"):
            torch.library.opcheck(op, arguments, test_utils=utilities)
    else:
        torch.library.opcheck(op, arguments, test_utils=utilities)


@pytest.mark.parametrize("wanted", [False, True], ids=["nothing", "everything"])
@pytest.mark.parametrize("schema", [s for s in _schema_arguments() if s.endswith("_backward")])
def test_opcheck_of_what_is_wanted(schema: str, wanted: bool) -> None:
    *arguments, needs = _schema_arguments()[schema]
    if not isinstance(needs, list):
        pytest.skip("always gives all of its gradients")
    op = getattr(torch.ops.fastvlm, schema).default
    torch.library.opcheck(
        op, (*arguments, [wanted] * len(needs)), test_utils=("test_schema", "test_faketensor")
    )


FORWARD_ONLY: dict[str, Callable[..., Any]] = {
    "low_precision_linear": lambda h, w: ops.low_precision_linear(h, w.bfloat16()),
    "linear_topk": lambda h, w: ops.linear_topk(h, w, 3, softcap=3.0),
    "cached_attention": lambda h, w: ops.cached_attention(
        h.view(2, 2, 4), w.view(2, 4, 1, 4), w.view(2, 4, 1, 4), torch.tensor([4, 1])
    ),
}


def same(got: Any, want: Any) -> None:
    for a, b in zip(_outs(got), _outs(want), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.turns(3)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", list(CASES))
def test_compiles_as_one_graph(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    inputs = make(name)
    compiled = torch.compile(CASES[name].run, fullgraph=True, dynamic=dynamic)
    outs, want = _outs(compiled(*inputs)), _outs(CASES[name].run(*inputs))
    same(outs, want)
    given = [torch.randn_like(o) for o in want]
    same(torch.autograd.grad(outs, inputs, given), torch.autograd.grad(want, inputs, given))


@pytest.mark.parametrize("name", list(FORWARD_ONLY))
def test_decoding_ops_compile_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    h, w = torch.randn(2, 8), torch.randn(4, 8)
    compiled = torch.compile(FORWARD_ONLY[name], fullgraph=True, backend="aot_eager")
    same(compiled(h, w), FORWARD_ONLY[name](h, w))


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.dropout])
def test_dropout_compiles_and_keeps_one_mask(name: str) -> None:
    """aot_eager draws the seed as eager does, so the masks of the two can be compared."""
    torch._dynamo.reset()
    case, inputs = CASES[name], make(name)

    def run(*x: Tensor) -> Any:
        return case.dropout(*x, dropout_p=0.4)  # type: ignore[misc]

    torch.manual_seed(2)
    want = gradients(run, inputs)
    torch.manual_seed(2)
    same(
        tuple(gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs)),
        tuple(want),
    )


def _heads(x: Tensor) -> list[Tensor]:
    """Three tensors, as a projection would give them: one twice in a Function is not traced."""
    return [(x * n).view(-1, 4, 2) for n in (1, 2, 3)]


def _tables(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.detach()[:, :2].cos(), x.detach()[:, :2].sin()


ROWS: dict[str, Callable[[Tensor, Layout], Any]] = {
    "cross_attention": lambda x, layout: ops.cross_attention(*_heads(x), layout),
    "self_attention": lambda x, layout: ops.self_attention(*_heads(x), layout, window=2),
    "linear": lambda x, layout: ops.linear(x, x[:3].sin()),
    "gelu_mlp": lambda x, layout: ops.gelu_mlp(x, x[:3].sin(), None, x[:2, :3].cos(), None),
    "geglu_mlp": lambda x, layout: ops.geglu_mlp(x, x[:3].sin(), x[:3].cos(), x[:2, :3].exp()),
    "rms_norm": lambda x, layout: ops.rms_norm(x, x[0].sin()),
    "residual_rms_norm": lambda x, layout: ops.residual_rms_norm(x, x.sin(), x[0].cos()),
    "residual_layer_norm": lambda x, layout: ops.residual_layer_norm(
        x, x.sin(), x[0].cos(), x[1].exp()
    ),
    "rope": lambda x, layout: ops.rope(*_heads(x)[:2], *_tables(x)),
    "linear_cross_entropy": lambda x, layout: ops.linear_cross_entropy(
        x, x[:3].sin(), layout.positions % 3
    ),
}


@pytest.mark.parametrize("name", list(ROWS))
def test_one_graph_serves_any_number_of_rows(name: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ROWS[name], fullgraph=True, dynamic=True, backend=counting)
    for lengths in ([4, 3, 3], [2, 7], [5, 6], [3, 4, 9, 6, 1]):
        layout, x = Layout.from_lengths(lengths), torch.randn(sum(lengths), 8)
        same(compiled(x, layout), ROWS[name](x, layout))
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        for run, leaf in zip((compiled, ROWS[name]), leaves):
            total(run(leaf, layout)).backward()
        same(leaves[0].grad, leaves[1].grad)
    assert len(graphs) == 2, "one without gradients and one with them"
