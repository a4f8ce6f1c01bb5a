"""Rotary positions against transformers' apply_rotary_pos_emb, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import engines, gpu_baselines
from benchmarks.cases import ROPE
from benchmarks.kinds import RopeCase
from benchmarks.measure import Function, Operands, trained
from benchmarks.micro import each
from fastvlm import ops

BASE = 10_000.0


def operands(case: RopeCase, dtype: torch.dtype, device: str) -> Operands:
    """q, k, cos, sin; in training the gradients of both results behind them."""

    def random(heads: int) -> Tensor:
        return torch.randn(case.rows, heads, case.head_dim, dtype=dtype, device=device)

    frequencies = BASE ** (-torch.arange(0, case.head_dim, 2) / case.head_dim)
    angles = (torch.arange(case.rows)[:, None] * frequencies).repeat(1, 2)
    tables = tuple(table.to(device=device, dtype=dtype) for table in (angles.cos(), angles.sin()))
    inputs = (random(case.heads), random(case.kv_heads), *tables)
    return (*inputs, (random(case.heads), random(case.kv_heads))) if case.trains else inputs


def rope_eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def half_turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + half_turned(q) * sin, k * cos + half_turned(k) * sin


def functions(case: RopeCase, device: str = "cpu", *, compiled: bool = True) -> dict[str, Function]:
    sides = {
        "eager": rope_eager,
        **(engines.compiled(rope_eager) if compiled else {}),
        "fastvlm": ops.rope,
    }
    if device == "cuda":
        sides |= gpu_baselines.rope()
    if not case.trains:
        return sides
    return {name: trained(side, (0, 1)) for name, side in sides.items()}


@each(ROPE)
def test_rope(
    run_case: Callable[..., None], case: RopeCase, dtype: torch.dtype, device: str
) -> None:
    run_case(case, dtype, lambda: operands(case, dtype, device), functions(case, device))
