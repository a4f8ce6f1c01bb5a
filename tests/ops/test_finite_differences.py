"""Backward of the CPU kernels in float32 against differences of their own forward.

The error rule holds the gradients to PyTorch's; this asks the kernel itself, dropout included: with
the generator at one place, each op is an ordinary function of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvlm
from fastvlm import Layout, extension, ops

READERS = Layout.from_lengths([3, 0, 40, 9], [70, 6, 4], [0, 0, 2, 0])
SEGMENTS = Layout.from_lengths([5, 0, 1, 66])
P = {"dropout_p": 0.3}
LABELS = torch.tensor([3, -100, 700, 0, 1, -100, 8])

# the function, and the shapes of its inputs
CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "cross_attention": (
        lambda q, k, v: ops.cross_attention(q, k, v, READERS, softcap=4.0, **P),
        [(52, 4, 17), (80, 2, 17), (80, 2, 17)],
    ),
    "self_attention": (
        lambda q, k, v: ops.self_attention(q, k, v, SEGMENTS, window=20, **P),
        [(72, 2, 32), (72, 1, 32), (72, 1, 32)],
    ),
    "position_bias": (
        lambda q, k, v, b: ops.self_attention(q, k, v, SEGMENTS, softcap=4.0, position_bias=b, **P),
        [(72, 4, 32), (72, 2, 32), (72, 2, 32), (4, 25)],
    ),
    "gelu_mlp": (
        lambda *x: ops.gelu_mlp(*x, **P),
        [(7, 17), (63, 17), (63,), (5, 63), (5,)],
    ),
    "geglu_mlp": (ops.geglu_mlp, [(70, 17), (63, 17), (63, 17), (5, 63)]),
    "linear": (ops.linear, [(90, 17), (63, 17), (63,)]),
    "rms_norm": (ops.rms_norm, [(30, 100), (100,)]),
    "residual_rms_norm": (
        lambda x, r, w, n, g: ops.residual_rms_norm(x, r, w, gate=g, next_weight=n),
        [(30, 100), (30, 100), (100,), (100,), (1,)],
    ),
    "residual_layer_norm": (
        lambda *x: ops.residual_layer_norm(*x, **P),
        [(30, 100), (30, 100), (100,), (100,)],
    ),
    "rope": (
        lambda q, k: ops.rope(q, k, torch.rand(9, 6), torch.rand(9, 6)),
        [(9, 4, 8), (9, 2, 8)],
    ),
    "linear_cross_entropy": (
        lambda h, w, b: ops.linear_cross_entropy(h, w, LABELS, bias=b, softcap=9.0),
        [(7, 20), (999, 20), (999,)],
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_gradient_is_the_slope_of_forward(case: str, seed: int) -> None:
    if not extension.available():
        pytest.skip(f"no CPU extension: {extension.reason()}")
    function, shapes = CASES[case]
    inputs = [torch.randn(s, requires_grad=True) for s in shapes]
    directions = [torch.randn(s) for s in shapes]

    def value(step: float) -> Tensor:
        """A weighted sum of the outputs, some way along the directions of all inputs."""
        torch.manual_seed(seed)
        out = function(*(x + step * d for x, d in zip(inputs, directions)))
        outs = out if isinstance(out, tuple) else (out,)
        weights = (torch.arange(o.numel()).cos().view(o.shape) for o in outs)
        return sum((o.double() * w).sum() for o, w in zip(outs, weights))  # type: ignore[return-value]

    with fastvlm.use("cpu"):
        grads = torch.autograd.grad(value(0.0), inputs)
        step = 2e-3
        with torch.no_grad():
            slope = (value(step) - value(-step)) / (2 * step)
    parts = [(g.double() * d).sum() for g, d in zip(grads, directions)]
    size = torch.stack([p.abs() for p in parts]).sum()
    assert abs(sum(parts) - slope) < 2e-3 * size
