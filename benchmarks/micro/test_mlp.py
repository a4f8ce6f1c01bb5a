"""The MLPs of a decoding step against the same expression in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import MLP, MlpCase
from benchmarks.measure import Operands
from fastvlm import ops


def operands(case: MlpCase, dtype: torch.dtype, device: str) -> Operands:
    def weight(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, dtype=dtype, device=device).mul_(inputs**-0.5)

    def bias(size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    x = torch.randn(case.rows, case.width, dtype=dtype, device=device)
    if case.gated:
        up = (weight(case.hidden, case.width), weight(case.hidden, case.width))
        return x, *up, weight(case.width, case.hidden)
    first = (weight(case.hidden, case.width), bias(case.hidden))
    return x, *first, weight(case.width, case.hidden), bias(case.width)


def gelu_eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def geglu_eager(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    gate = F.gelu(F.linear(x, w_gate), approximate="tanh")
    return F.linear(gate * F.linear(x, w_up), w_down)


@pytest.mark.parametrize("case", MLP, ids=lambda case: case.name)
def test_mlp(run_case: Callable[..., None], case: MlpCase, dtype: torch.dtype, device: str) -> None:
    if case.gated:
        functions: dict[str, Callable[..., Tensor]] = {
            "torch": geglu_eager,
            "fastvlm": ops.geglu_mlp,
        }
    else:
        functions = {"torch": gelu_eager, "fastvlm": ops.gelu_mlp}
    run_case(case, lambda: operands(case, dtype, device), functions)
