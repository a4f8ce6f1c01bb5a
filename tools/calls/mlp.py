"""Calls of the MLPs. Few, some and many rows are products of different tiles."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from tools.calls.shapes import DROPOUT, TRAINING, Build, empty, frozen, ints, seed

ROWS = (1, 32, TRAINING)
GEGLU, GELU = (2304, 9216), (768, 3072)


def _geglu() -> list[tuple[str, Build]]:
    def build(m: int, tanh: bool, keep: bool) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            n, f = GEGLU
            w = empty(f, n, dtype=dtype)
            return empty(m, n, dtype=dtype), w, w, empty(n, f, dtype=dtype), tanh, keep

        return args

    return [
        (f"{m} rows, tanh {tanh}, keep {keep}", build(m, tanh, keep))
        for m in ROWS
        for tanh, keep in ((True, False), (True, True), (False, True))
    ]


def _geglu_backward() -> list[tuple[str, Build]]:
    def build(m: int, tanh: bool, needs: list[bool]) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            n, f = GEGLU
            x, hidden = empty(m, n, dtype=dtype), empty(m, f, dtype=dtype)
            w = empty(f, n, dtype=dtype)
            return x, x, hidden, hidden, w, w, empty(n, f, dtype=dtype), tanh, needs

        return args

    options = [(m, tanh, frozen(4)) for m in ROWS for tanh in (True, False)]
    options += [(TRAINING, True, needs) for needs in (frozen(4, 1, 2, 3), frozen(4, 0))]
    return [
        (f"{m} rows, tanh {tanh}, needs {needs}", build(m, tanh, needs))
        for m, tanh, needs in options
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
    def build(m: int, dropout: bool, tanh: bool, needs: list[bool]) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            n, f = GELU
            x, pre = empty(m, n, dtype=dtype), empty(m, f, dtype=dtype)
            w1, w2 = empty(f, n, dtype=dtype), empty(n, f, dtype=dtype)
            return x, x, pre, w1, w2, seed(dropout), tanh, DROPOUT if dropout else 0.0, needs

        return args

    options = [(m, dropout, False, frozen(5)) for m in ROWS for dropout in (False, True)]
    options += [(TRAINING, dropout, False, frozen(5, 1, 2, 3, 4)) for dropout in (False, True)]
    options += [(TRAINING, True, True, frozen(5))]
    return [
        (f"{m} rows, dropout {dropout}, tanh {tanh}, needs {needs}", build(m, dropout, tanh, needs))
        for m, dropout, tanh, needs in options
    ]


def _low_precision() -> list[tuple[str, Build]]:
    def build(m: int, shape: tuple[int, int], integers: bool, bias: bool) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            n, f = shape
            weight = ints(f, n, dtype=torch.int8 if integers else torch.bfloat16)
            scale = torch.empty(f) if integers else None
            b = empty(f, dtype=dtype) if bias else None
            return empty(m, n, dtype=dtype), weight, scale, b

        return args

    up, down = GEGLU, GEGLU[::-1]
    # many rows of a 16-bit weight are the library's where x has its dtype
    options = [(1, up, False), (1, up, True), (1, down, False), (1, down, True)]
    options += [(32, up, False), (32, up, True), (TRAINING, up, True)]
    return [
        (f"{m} rows, {shape}, int8 {integers}, bias {bias}", build(m, shape, integers, bias))
        for m, shape, integers in options
        for bias in (False, True)
    ]


CALLS = {
    "geglu_mlp": _geglu(),
    "geglu_mlp_backward": _geglu_backward(),
    "gelu_mlp": _gelu(),
    "gelu_mlp_backward": _gelu_backward(),
    "low_precision_linear": _low_precision(),
}
