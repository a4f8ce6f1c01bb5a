"""The raw rope kernel against the reference in float64: odd sizes, dtypes, strides."""

from __future__ import annotations

from collections.abc import Callable

import error_rule
import pytest
import torch
from torch import Tensor

import fastvlm
from fastvlm import extension
from fastvlm.reference import rope as reference

# head dimension, and how much of it turns
DIMS = [(2, 2), (6, 6), (64, 64), (17, 10), (80, 32), (256, 256), (5, 0)]


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not extension.available():
        pytest.skip(f"no CPU extension: {extension.reason()}")


def raw(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.fastvlm_cpu.rope(q, k, cos, sin, back)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "rotary"), DIMS)
@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
def test_numbers(
    back: bool, dim: int, rotary: int, tables: torch.dtype, dtype: torch.dtype, randn: Callable
) -> None:
    """Halves of the tables that differ, in a dtype of their own, cut out of wider ones."""
    formula = reference.rope_backward if back else reference.rope
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for tokens in (0, 1, 3, 70):
        cos, sin = torch.randn(2, tokens, rotary + 3).to(tables)[..., 3:]
        q = randn(tokens, 6, dim + 5)[..., 5:]
        k = randn(2, tokens, dim).transpose(0, 1)
        ours = raw(q, k, cos, sin, back)
        exact = formula(*(x.double() for x in (q, k, cos, sin)))
        for a, b, c in zip(ours, formula(q, k, cos, sin), exact, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.is_contiguous()
            parts.append((a.flatten(), b.flatten(), c.flatten()))
        for a, x in zip(ours, (q, k)):
            assert torch.equal(a[..., rotary:], x[..., rotary:])
    ours_torchs_exact = (torch.cat(part) for part in zip(*parts))
    error_rule.check("rope", *ours_torchs_exact, error_rule.FORWARD)


def test_any_strides_through_the_op(dtype: torch.dtype, randn: Callable) -> None:
    """A last dimension with a step is made contiguous first; heads may repeat."""
    q, k = randn(9, 40, 4).transpose(1, 2), randn(9, 1, 40).expand(-1, 3, -1)
    cos, sin = randn(40, 9).T, randn(1, 40).expand(9, -1)
    with fastvlm.use("cpu"):
        for op in (torch.ops.fastvlm.rope, torch.ops.fastvlm.rope_backward):
            expected = op(*(x.contiguous() for x in (q, k, cos, sin)))
            for a, b in zip(op(q, k, cos, sin), expected, strict=True):
                assert torch.equal(a, b)


def test_backward_is_the_transpose() -> None:
    """<rope(q), g> = <q, rope_backward(g)> for any tables."""
    q, k, gq, gk = (torch.randn(30, h, 48) for h in (4, 2, 4, 2))
    cos, sin = torch.randn(2, 30, 32)
    out, back = raw(q, k, cos, sin, False), raw(gq, gk, cos, sin, True)
    for x, y, g, d in zip((q, k), out, (gq, gk), back):
        assert torch.allclose((y.double() * g).sum(), (x.double() * d).sum(), rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("poison")
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype, randn: Callable) -> None:
    q, k, cos, sin = randn(500, 6, 64), randn(500, 2, 64), randn(500, 64), randn(500, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = raw(q, k, cos, sin, False)
        for count in (2, 7):
            torch.set_num_threads(count)
            for a, b in zip(raw(q, k, cos, sin, False), expected, strict=True):
                assert torch.equal(a, b), f"{count} threads"
    finally:
        torch.set_num_threads(before)


def test_memory_is_guarded() -> None:
    q, k, table = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(3, 8)
    for args, message in (
        ((q[0], k, table, table), "q: expected 3 dimensions"),
        ((q.transpose(1, 2), k, table, table), "q: the last dimension must be contiguous"),
        ((q, k.half(), table, table), "k: expected q's dtype"),
        ((q, k[:2], table, table), "k: expected 3 rows"),
        ((q, k[..., :6], table, table), "k: expected 3 rows"),
        ((q, k, table[:2], table[:2]), "cos, sin: expected"),
        ((q, k, table, table[:, :6]), "cos, sin: expected"),
        ((q, k, table[:, :7], table[:, :7]), "cos, sin: expected"),
        ((q, k, torch.randn(3, 10), torch.randn(3, 10)), "cos, sin: expected"),
        ((q, k, table.double(), table), "cos: expected float32"),
        ((q.double(), k.double(), table, table), "q: expected float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw(*args, False)
