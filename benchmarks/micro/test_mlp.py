"""The MLPs of a decoding step against the same expression in PyTorch and in inference engines; on a
GPU compiled too, and in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import engines, gpu_baselines
from benchmarks.cases import MLP
from benchmarks.kinds import MlpCase
from benchmarks.measure import Function, Operands, trained
from benchmarks.micro import each
from fastvlm import ops


def operands(case: MlpCase, dtype: torch.dtype, device: str) -> Operands:
    def weight(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, dtype=dtype, device=device).mul_(inputs**-0.5)

    def bias(size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    x = torch.randn(case.rows, case.width, dtype=dtype, device=device)
    # the gradient of the result, last
    grad = (torch.randn_like(x),) if case.trains else ()
    if case.gated:
        up = (weight(case.hidden, case.width), weight(case.hidden, case.width))
        weights = (*up, weight(case.width, case.hidden))
        if case.trains:
            return x, *weights, *grad
        wanted = case.engines and device == "cpu"
        return x, *weights, engines.geglu_sessions(case, weights) if wanted else {}
    first = (weight(case.hidden, case.width), bias(case.hidden))
    return x, *first, weight(case.width, case.hidden), bias(case.width), *grad


def gelu_eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def geglu_eager(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *_: Any) -> Tensor:
    gate = F.gelu(F.linear(x, w_gate), approximate="tanh")
    return F.linear(gate * F.linear(x, w_up), w_down)


def geglu_ours(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *_: Any) -> Tensor:
    return ops.geglu_mlp(x, w_gate, w_up, w_down)


def functions(
    case: MlpCase, sessions: Iterable[str] = (), device: str = "cpu", *, compiled: bool = True
) -> dict[str, Function]:
    """sessions: the engines that the operands hold."""

    def engine(name: str) -> Function:
        return lambda x, w_gate, w_up, w_down, held: held[name](x)

    eager, ours = (geglu_eager, geglu_ours) if case.gated else (gelu_eager, ops.gelu_mlp)
    sides: dict[str, Function] = {"torch": eager, **{n: engine(n) for n in sessions}}
    if device == "cuda":
        sides |= engines.compiled(eager) if compiled else {}
        sides |= gpu_baselines.geglu_mlp() if case.gated else {}
    sides["fastvlm"] = ours
    if not case.trains:
        return sides
    places = range(4 if case.gated else 5)
    return {name: trained(side, places) for name, side in sides.items()}


@each(MLP)
def test_mlp(run_case: Callable[..., None], case: MlpCase, dtype: torch.dtype, device: str) -> None:
    held = engines.names(dtype) if case.engines and device == "cpu" else []
    sides = functions(case, held, device)
    run_case(case, dtype, lambda: operands(case, dtype, device), sides, settle=bool(held))
