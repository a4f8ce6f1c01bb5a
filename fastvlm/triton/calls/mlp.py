"""Calls of the MLPs. Few, some and many rows are products of different tiles."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from fastvlm.triton.calls.shapes import DROPOUT, TRAINING, Build, empty, frozen, ints, seed

ROWS = (1, 32, TRAINING)
GEGLU, GELU = (2304, 9216), (768, 3072)


def _geglu() -> list[tuple[str, Build]]:
    def build(m: int, keep: bool) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            n, f = GEGLU
            w = empty(f, n, dtype=dtype)
            return empty(m, n, dtype=dtype), w, w, empty(n, f, dtype=dtype), True, keep

        return args

    return [(f"{m} rows, keep {keep}", build(m, keep)) for m in ROWS for keep in (False, True)]


def _geglu_backward() -> list[tuple[str, Build]]:
    def build(needs: list[bool]) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            n, f = GEGLU
            x, hidden = empty(TRAINING, n, dtype=dtype), empty(TRAINING, f, dtype=dtype)
            w = empty(f, n, dtype=dtype)
            return x, x, hidden, hidden, w, w, empty(n, f, dtype=dtype), True, needs

        return args

    return [
        (f"needs {needs}", build(needs)) for needs in (frozen(4), frozen(4, 1, 2, 3), frozen(4, 0))
    ]


def _gelu() -> list[tuple[str, Build]]:
    def build(m: int, dropout: bool, tanh: bool, keep: bool) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            n, f = GELU
            w1, b1 = empty(f, n, dtype=dtype), empty(f, dtype=dtype)
            w2, b2 = empty(n, f, dtype=dtype), empty(n, dtype=dtype)
            p = DROPOUT if dropout else 0.0
            return empty(m, n, dtype=dtype), w1, b1, w2, b2, seed(dropout), tanh, p, keep

        return args

    options: list[tuple[int, bool, bool, bool]] = [(m, False, False, False) for m in ROWS]
    for dropout, tanh in itertools.product((False, True), repeat=2):
        options.append((TRAINING, dropout, tanh, True))
    return [
        (f"{m} rows, dropout {dropout}, tanh {tanh}, keep {keep}", build(m, dropout, tanh, keep))
        for m, dropout, tanh, keep in options
    ]


def _gelu_backward() -> list[tuple[str, Build]]:
    def build(dropout: bool, needs: list[bool]) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            n, f = GELU
            x, pre = empty(TRAINING, n, dtype=dtype), empty(TRAINING, f, dtype=dtype)
            w1, w2 = empty(f, n, dtype=dtype), empty(n, f, dtype=dtype)
            return x, x, pre, w1, w2, seed(dropout), False, DROPOUT if dropout else 0.0, needs

        return args

    return [
        (f"dropout {dropout}, needs {needs}", build(dropout, needs))
        for dropout in (False, True)
        for needs in (frozen(5), frozen(5, 1, 2, 3, 4))
    ]


def _low_precision() -> list[tuple[str, Build]]:
    def build(m: int, integers: bool, bias: bool) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            n, f = GEGLU
            weight = ints(f, n, dtype=torch.int8 if integers else torch.bfloat16)
            scale = torch.empty(f) if integers else None
            b = empty(f, dtype=dtype) if bias else None
            return empty(m, n, dtype=dtype), weight, scale, b

        return args

    return [
        (f"{m} rows, int8 {integers}, bias {bias}", build(m, integers, bias))
        for m in (1, 32)
        for integers, bias in itertools.product((False, True), repeat=2)
    ]


CALLS = {
    "geglu_mlp": _geglu(),
    "geglu_mlp_backward": _geglu_backward(),
    "gelu_mlp": _gelu(),
    "gelu_mlp_backward": _gelu_backward(),
    "low_precision_linear": _low_precision(),
}
