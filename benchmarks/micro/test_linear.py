"""The projections of a decoding step: a few rows, so the weight's bytes are the floor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.cases import LINEAR
from benchmarks.kinds import LinearCase
from benchmarks.measure import Operands
from benchmarks.micro import each
from fastvlm import ops


def operands(case: LinearCase, dtype: torch.dtype, device: str) -> Operands:
    x = torch.randn(case.rows, case.inputs, dtype=dtype, device=device)
    weight = torch.randn(case.outputs, case.inputs, dtype=dtype, device=device)
    bias = torch.randn(case.outputs, dtype=dtype, device=device) if case.bias else None
    return x, weight.mul_(case.inputs**-0.5), bias


@each(LINEAR)
def test_linear(
    run_case: Callable[..., None], case: LinearCase, dtype: torch.dtype, device: str
) -> None:
    run_case(
        case,
        dtype,
        lambda: operands(case, dtype, device),
        {"torch": F.linear, "fastvlm": ops.linear},
    )
