"""rope against plain PyTorch, and against transformers' own."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
from transformers.models.gemma2 import modeling_gemma2

from fastvlm import ops


def tables(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(tokens)[:, None] * 1e4 ** (-torch.arange(0, dim, 2) / dim)
    return torch.cat([angle, angle], 1).cos(), torch.cat([angle, angle], 1).sin()


@pytest.mark.parametrize("tokens", [0, 1, 17, 100])
@pytest.mark.parametrize("dim", [64, 256, 6])
def test_rope(
    tokens: int, dim: int, on: Any, randn: Any, dtype: torch.dtype, follows_the_error_rule: Any
) -> None:
    cos, sin = (t.to(dtype) for t in tables(tokens, dim))
    follows_the_error_rule(
        lambda q, k, c, s: on(ops.rope, q, k, c, s),
        plain.rope,
        [randn(tokens, 4, dim, grad=True), randn(tokens, 2, dim, grad=True), cos, sin],
    )


def test_as_transformers() -> None:
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    cos, sin = tables(9, 16)
    want_q, want_k = modeling_gemma2.apply_rotary_pos_emb(q, k, cos[None], sin[None])
    got_q, got_k = ops.rope(q[0].transpose(0, 1), k[0].transpose(0, 1), cos, sin)
    assert torch.allclose(got_q.transpose(0, 1), want_q[0], atol=1e-6)
    assert torch.allclose(got_k.transpose(0, 1), want_k[0], atol=1e-6)


def test_dims_past_the_tables_pass_through() -> None:
    q, k = torch.randn(5, 2, 16), torch.randn(5, 1, 16)
    cos, sin = tables(5, 8)
    got, _ = ops.rope(q, k, cos, sin)
    assert torch.equal(got[..., 8:], q[..., 8:])
    assert torch.allclose(got[..., :8], plain.rope(q[..., :8], k[..., :8], cos, sin)[0])


def test_gradient_for_tables_whose_halves_differ() -> None:
    inputs = [torch.randn(3, h, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1)]
    cos, sin = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: ops.rope(q, k, cos, sin), inputs)
