"""Calls of the output head. Florence-2's vocabulary is odd; of the models only PaliGemma's has a
softcap, and none a bias beside it, which a user's may have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tools.calls.shapes import TRAINING, Build, empty, frozen, ints

# rows that one step takes: few, a tile, a packed batch
ROWS = (4, 32, 64, TRAINING)
# width, vocabulary, softcap, bias: the kernels do not differ by how large a multiple of 16 is, so
# the vocabulary of Gemma-2 stands here with fewer rows than it has
HEADS = (
    (2304, 32768, 30.0, False),
    (768, 51289, 0.0, False),
    (768, 51289, 0.0, True),
    (2304, 32768, 30.0, True),
)
BEAMS = 8

Head = tuple[int, int, float, bool]


def _tensors(m: int, head: Head, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    n, vocabulary, _, bias = head
    b = empty(vocabulary, dtype=dtype) if bias else None
    return empty(m, n, dtype=dtype), empty(vocabulary, n, dtype=dtype), b


def _forward() -> list[tuple[str, Build]]:
    def build(m: int, head: Head) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            h, weight, bias = _tensors(m, head, dtype)
            return h, weight, ints(m, dtype=torch.int64), bias, head[2], -100

        return args

    return [(f"{m} rows, {head}", build(m, head)) for m in ROWS for head in HEADS]


def _backward() -> list[tuple[str, Build]]:
    def build(m: int, head: Head, skip_below: float, needs: list[bool]) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            h, weight, bias = _tensors(m, head, dtype)
            nll, lse = torch.empty(m), torch.empty(m, 2)
            labels = ints(m, dtype=torch.int64)
            return nll, h, weight, labels, bias, lse, head[2], -100, skip_below, needs

        return args

    training = [
        (TRAINING, head, skip_below, needs)
        for head in HEADS
        for skip_below in (0.0, 2.0**-12)
        for needs in (frozen(3) if head[3] else frozen(3, 2), frozen(3, 1, 2))
    ]
    # a batch of which little is left; the weight's rows are tokens, so only h's gradient differs
    few = [(m, head, 0.0, frozen(3, 1, 2)) for m in ROWS[:-1] for head in HEADS]
    return [
        (f"{m} rows, {head}, skip_below {skip}, needs {needs}", build(m, head, skip, needs))
        for m, head, skip, needs in [*training, *few]
    ]


def _topk() -> list[tuple[str, Build]]:
    def build(m: int, head: Head) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            h, weight, bias = _tensors(m, head, dtype)
            return h, weight, BEAMS, bias, head[2]

        return args

    return [(f"{m} rows, {head}", build(m, head)) for m in ROWS[:-1] for head in HEADS]


CALLS = {
    "linear_cross_entropy": _forward(),
    "linear_cross_entropy_backward": _backward(),
    "linear_topk": _topk(),
}
