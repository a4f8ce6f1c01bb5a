"""Each op of the Triton and CUDA kernels, once, small, in shapes of the models.

On a GPU this is what runs first (benchmarks/gpu_check): a minute says whether the kernels are right
at all. The same calls run in the emulators, so that what the first GPU sees is known to be right
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import cuda_emulator
import emulator
import plain
import pytest
import torch
from torch import Tensor

import fastvlm
from fastvlm import Layout, ops

EMULATED = {"cuda": cuda_emulator.emulated, "triton": emulator.emulated}


def sides(*backends: str) -> list[Any]:
    """Each backend on a GPU, and in its emulator."""
    return [
        pytest.param((backend, place), marks=mark, id=f"{backend}-{place}")
        for backend in backends
        for place, mark in (("emulator", getattr(pytest.mark, backend)), ("gpu", pytest.mark.gpu))
    ]


BOTH, TRITON = sides("triton", "cuda"), sides("triton")


@dataclass(frozen=True)
class Side:
    """trains: the backend has the op's backward pass too."""

    name: str
    trains: bool
    dtype: torch.dtype

    def tensor(self, *shape: int, scale: float = 1.0, grad: bool | None = None) -> Tensor:
        grad = self.trains if grad is None else grad
        x = (torch.randn(*shape) * scale).to(self.dtype)
        return x.to(self.name).requires_grad_(grad)


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def side(request: pytest.FixtureRequest, of: tuple[str, str]) -> Iterator[Side]:
    backend, place = of
    on_gpu = place == "gpu"
    with fastvlm.use(backend) if on_gpu else EMULATED[backend]():
        yield Side("cuda" if on_gpu else "cpu", backend == "triton", request.param)


def gradients(side: Side) -> Any:
    """The CUDA kernels of products serve no backward pass, and refuse a call that wants one."""
    return nullcontext() if side.trains else torch.no_grad()


@pytest.mark.parametrize("of", BOTH)
@pytest.mark.parametrize("d", [64, 256])
def test_cross_attention(d: int, side: Side, follows_the_error_rule: Callable[..., None]) -> None:
    """Four beams of each of two images, of a group of two heads."""
    lengths = [4, 4], [577, 50], [0, 1]
    layout = Layout.from_lengths(*lengths, device=side.name)
    follows_the_error_rule(
        lambda *x: ops.cross_attention(*x, layout, softcap=50.0),
        lambda *x: plain.attention(*x, *lengths, softcap=50.0),
        [side.tensor(8, 4, d), side.tensor(627, 2, d), side.tensor(627, 2, d)],
    )


@pytest.mark.parametrize("of", TRITON)
@pytest.mark.parametrize("d", [64, 256])
def test_self_attention(d: int, side: Side, follows_the_error_rule: Callable[..., None]) -> None:
    lengths = [70, 3, 33]
    layout = Layout.from_lengths(lengths, device=side.name)
    follows_the_error_rule(
        lambda *x: ops.self_attention(*x, layout, window=40, softcap=50.0),
        lambda *x: plain.attention(
            *x, lengths, lengths, [0, 1, 2], causal=True, window=40, softcap=50.0
        ),
        [side.tensor(106, 4, d), side.tensor(106, 2, d), side.tensor(106, 2, d)],
    )


@pytest.mark.parametrize("of", BOTH)
def test_cached_attention(side: Side, follows_the_error_rule: Callable[..., None]) -> None:
    filled, time = [130, 64, 1, 77], 130
    table = torch.randint(0, 4, (4, time), dtype=torch.int32)
    table[1, 5] = -1
    where = torch.tensor(filled, device=side.name), table.to(side.name)
    shapes = (4, 4, 128), (4, time, 2, 128), (4, time, 2, 128)
    follows_the_error_rule(
        lambda *x: ops.cached_attention(*x, where[0], ancestry=where[1]),
        lambda *x: plain.cached_attention(*x, filled, table),
        [side.tensor(*shape, grad=False) for shape in shapes],
    )


@pytest.mark.parametrize("of", BOTH)
def test_norms(side: Side, follows_the_error_rule: Callable[..., None]) -> None:
    rows, weight = (5, 2304), (2304,)
    inputs = [side.tensor(*shape, grad=True) for shape in (rows, rows, weight)]
    follows_the_error_rule(ops.rms_norm, plain.rms_norm, [inputs[0], inputs[2]])
    follows_the_error_rule(
        lambda x, r, w, g, y: ops.residual_rms_norm(x, r, w, gate=g, next_weight=y),
        plain.residual_rms_norm,
        [*inputs, side.tensor(1, grad=True), side.tensor(*weight, grad=True)],
    )
    follows_the_error_rule(
        ops.residual_layer_norm,
        plain.residual_layer_norm,
        [*inputs, side.tensor(*weight, grad=True)],
    )


@pytest.mark.parametrize("of", TRITON)
def test_rope(side: Side, follows_the_error_rule: Callable[..., None]) -> None:
    angles = torch.randn(40, 128).repeat(1, 2)
    cos, sin = (x.to(side.dtype).to(side.name) for x in (angles.cos(), angles.sin()))
    follows_the_error_rule(
        lambda q, k: ops.rope(q, k, cos.to(q), sin.to(q)),
        lambda q, k: plain.rope(q, k, cos.to(q), sin.to(q)),
        [side.tensor(40, 8, 256), side.tensor(40, 4, 256)],
    )


@pytest.mark.parametrize("of", BOTH)
def test_geglu_mlp(side: Side, follows_the_error_rule: Callable[..., None]) -> None:
    weights = [side.tensor(96, 768, scale=0.04), side.tensor(96, 768, scale=0.04)]
    with gradients(side):
        follows_the_error_rule(
            ops.geglu_mlp,
            lambda *x: plain.geglu_mlp(*x, "tanh"),
            [side.tensor(4, 768), *weights, side.tensor(64, 96, scale=0.1)],
        )


@pytest.mark.parametrize("of", BOTH)
def test_gelu_mlp(side: Side, follows_the_error_rule: Callable[..., None]) -> None:
    first = [side.tensor(96, 768, scale=0.04), side.tensor(96)]
    with gradients(side):
        follows_the_error_rule(
            lambda *x: ops.gelu_mlp(*x),
            lambda *x: plain.gelu_mlp(*x, "none"),
            [side.tensor(4, 768), *first, side.tensor(64, 96, scale=0.1), side.tensor(64)],
        )


@pytest.mark.parametrize("of", BOTH)
def test_low_precision_linear(side: Side, follows_the_error_rule: Callable[..., None]) -> None:
    weight = torch.randint(-127, 128, (96, 768), dtype=torch.int8, device=side.name)
    scale = torch.rand(96).to(side.name) * 4e-4
    with torch.no_grad():
        follows_the_error_rule(
            lambda x: ops.low_precision_linear(x, weight, scale),
            lambda x: x @ (weight.double() * scale.double()[:, None]).to(x.dtype).t(),
            [side.tensor(4, 768, grad=False)],
        )


@pytest.mark.parametrize("of", TRITON)
def test_linear_cross_entropy(side: Side, follows_the_error_rule: Callable[..., None]) -> None:
    labels = torch.randint(300, (20,))
    labels[::3] = -100
    labels = labels.to(side.name)
    follows_the_error_rule(
        lambda h, w: ops.linear_cross_entropy(h, w, labels, softcap=30.0),
        lambda h, w: plain.linear_cross_entropy(h, w, labels, softcap=30.0),
        [side.tensor(20, 256), side.tensor(300, 256, scale=0.1)],
    )


@pytest.mark.parametrize("of", BOTH)
def test_linear_topk(side: Side, follows_the_error_rule: Callable[..., None]) -> None:
    def plainly(h: Tensor, weight: Tensor) -> Tensor:
        logits = h @ weight.t()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.log_softmax(-1).topk(8).values

    with torch.no_grad():
        follows_the_error_rule(
            lambda h, weight: ops.linear_topk(h, weight, 8)[0],
            plainly,
            [
                side.tensor(4, 768, grad=False),
                side.tensor(1000, 768, scale=0.04, grad=False),
            ],
        )
