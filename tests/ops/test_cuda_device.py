"""Each op of the CUDA library at shapes of the models: on a GPU where there is one (gpu-check).

The same calls run in the emulator, so that what the first GPU sees is known to be right here.
"""

from __future__ import annotations

from typing import Any

import cuda_emulator
import plain
import pytest
import torch
from torch import Tensor

import fastvlm
from fastvlm import Layout, ops

KINDS = [
    pytest.param("cpu", marks=pytest.mark.cuda, id="emulator"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest) -> Any:
    on_gpu = request.param == "cuda"
    with fastvlm.use("cuda") if on_gpu else cuda_emulator.emulated():
        yield request.param


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def make(request: pytest.FixtureRequest, device: str) -> Any:
    def tensor(*shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        x = (torch.randn(*shape) * scale).to(request.param)
        return x.to(device).requires_grad_(grad)

    return tensor


@pytest.mark.parametrize("d", [64, 256])
def test_cross_attention(d: int, make: Any, device: str, follows_the_error_rule: Any) -> None:
    """Four beams of each of two images, of a group of two heads."""
    lengths = [4, 4], [577, 50], [0, 1]
    layout = Layout.from_lengths(*lengths, device=device)
    follows_the_error_rule(
        lambda *x: ops.cross_attention(*x, layout, softcap=50.0),
        lambda *x: plain.attention(*x, *lengths, softcap=50.0),
        [make(8, 4, d), make(627, 2, d), make(627, 2, d)],
    )


def test_cached_attention(make: Any, device: str, follows_the_error_rule: Any) -> None:
    filled, time = [130, 64, 1, 77], 130
    table = torch.randint(0, 4, (4, time), dtype=torch.int32)
    table[1, 5] = -1
    where = torch.tensor(filled, device=device), table.to(device)
    follows_the_error_rule(
        lambda *x: ops.cached_attention(*x, where[0], ancestry=where[1]),
        lambda *x: plain.cached_attention(*x, filled, table),
        [make(4, 4, 128), make(4, time, 2, 128), make(4, time, 2, 128)],
    )


def test_norms(make: Any, follows_the_error_rule: Any) -> None:
    inputs = [make(5, 2304, grad=True), make(5, 2304, grad=True), make(2304, grad=True)]
    follows_the_error_rule(
        lambda x, r, w, g, y: ops.residual_rms_norm(x, r, w, gate=g, next_weight=y),
        plain.residual_rms_norm,
        [*inputs, make(1, grad=True), make(2304, grad=True)],
    )
    follows_the_error_rule(
        ops.residual_layer_norm, plain.residual_layer_norm, [*inputs, make(2304, grad=True)]
    )


def test_products(make: Any, device: str, follows_the_error_rule: Any) -> None:
    with torch.no_grad():
        wide = make(96, 768, scale=0.04)
        follows_the_error_rule(
            ops.geglu_mlp,
            lambda *x: plain.geglu_mlp(*x, "tanh"),
            [make(4, 768), wide, make(96, 768, scale=0.04), make(64, 96, scale=0.1)],
        )
        follows_the_error_rule(
            lambda *x: ops.gelu_mlp(*x),
            lambda *x: plain.gelu_mlp(*x, "none"),
            [make(4, 768), wide, make(96), make(64, 96, scale=0.1), make(64)],
        )
        weight = torch.randint(-127, 128, (96, 768), dtype=torch.int8, device=device)
        scale = torch.rand(96).to(device) * 4e-4
        follows_the_error_rule(
            lambda x: ops.low_precision_linear(x, weight, scale),
            lambda x: x @ (weight.double() * scale.double()[:, None]).to(x.dtype).t(),
            [make(4, 768)],
        )


def test_linear_topk(make: Any, follows_the_error_rule: Any) -> None:
    def plainly(h: Tensor, weight: Tensor) -> Tensor:
        logits = h @ weight.t()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.log_softmax(-1).topk(8).values

    with torch.no_grad():
        follows_the_error_rule(
            lambda h, weight: ops.linear_topk(h, weight, 8)[0],
            plainly,
            [make(4, 768), make(1000, 768, scale=0.04)],
        )
