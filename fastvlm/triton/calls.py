"""Calls of each op as the models make them, for tools that need every kernel compiled.

The shapes are those of the decoders of Florence-2-base and -large and of Gemma-2-2b and -9b, in
training (rows of a packed batch) and in decoding (one to 64 rows). What counts is which
specializations they lead to: dtypes, sizes that are multiples of 16, options, blocks. So one call
stands for all that differ only in how much they do, and the tensors are left as they are
allocated: nobody reads or writes them.

CALLS has, for each op, (label, function of a dtype that builds the arguments of the op's schema).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Build = Callable[[torch.dtype], tuple[Any, ...]]

FLORENCE = {768: (12, 12, 64), 1024: (16, 16, 64)}
GEMMA = {2304: (8, 4, 256), 3584: (16, 8, 256)}
TRAINING, STEP = 4096, 32
ROWS = (TRAINING, STEP)
EPS, OFFSET, DROPOUT = 1e-6, 1.0, 0.1


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _seed(on: bool) -> Tensor | None:
    return torch.empty((), dtype=torch.int64) if on else None


def _frozen(n: int, *frozen: int) -> list[bool]:
    """needs, with those at the given places off."""
    return [place not in frozen for place in range(n)]


def _rms_norm() -> list[tuple[str, Build]]:
    def build(m: int, n: int) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            return _empty(m, n, dtype=dtype), _empty(n, dtype=dtype), EPS, OFFSET

        return args

    return [(f"{m} x {n}", build(m, n)) for m in ROWS for n in (*FLORENCE, *GEMMA)]


def _rms_norm_backward() -> list[tuple[str, Build]]:
    def build(m: int, n: int, needs: list[bool]) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            x = _empty(m, n, dtype=dtype)
            return x, x, _empty(n, dtype=dtype), EPS, OFFSET, needs

        return args

    return [
        (f"{m} x {n}, needs {needs}", build(m, n, needs))
        for m in ROWS
        for n in (*FLORENCE, *GEMMA)
        for needs in (_frozen(2), _frozen(2, 1), _frozen(2, 0))
    ]


def _residual_rms_norm() -> list[tuple[str, Build]]:
    def build(m: int, n: int, gate: bool, following: bool) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            x, w = _empty(m, n, dtype=dtype), _empty(n, dtype=dtype)
            g = _empty(1, dtype=dtype) if gate else None
            return x, x, w, g, w if following else None, EPS, OFFSET

        return args

    return [
        (f"{m} x {n}, gate {gate}, next {following}", build(m, n, gate, following))
        for m in ROWS
        for n in (*FLORENCE, *GEMMA)
        for gate, following in itertools.product((False, True), repeat=2)
    ]


def _residual_rms_norm_backward() -> list[tuple[str, Build]]:
    def build(
        m: int, n: int, gate: bool, following: bool, grad_h: bool, needs: list[bool]
    ) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            x, w = _empty(m, n, dtype=dtype), _empty(n, dtype=dtype)
            gh, gy = x if grad_h else None, x if following else None
            g = _empty(1, dtype=dtype) if gate else None
            return gh, gy, x, x, w, g, w if following else None, EPS, OFFSET, needs

        return args

    return [
        (
            f"{m} x {n}, gate {gate}, next {following}, grad_h {grad_h}, needs {needs}",
            build(m, n, gate, following, grad_h, needs),
        )
        for m in ROWS
        for n in (*FLORENCE, *GEMMA)
        for gate, following in itertools.product((False, True), repeat=2)
        # the last layer's h has no reader beside y; all train, the weights are frozen, and, as in a
        # frozen decoder, only the gate trains
        for grad_h, needs in (
            (True, _frozen(5)),
            (True, _frozen(5, 2, 3, 4)),
            *([(True, _frozen(5, 2, 4))] if gate else []),
            *([(False, _frozen(5))] if following else []),
        )
    ]


def _residual_layer_norm() -> list[tuple[str, Build]]:
    def build(m: int, n: int, dropout: bool) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            x, w = _empty(m, n, dtype=dtype), _empty(n, dtype=dtype)
            return x, x, w, w, _seed(dropout), EPS, DROPOUT if dropout else 0.0

        return args

    return [
        (f"{m} x {n}, dropout {dropout}", build(m, n, dropout))
        for m in ROWS
        for n in FLORENCE
        for dropout in (False, True)
    ]


def _residual_layer_norm_backward() -> list[tuple[str, Build]]:
    def build(m: int, n: int, dropout: bool, needs: list[bool]) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            x, w = _empty(m, n, dtype=dtype), _empty(n, dtype=dtype)
            return x, x, x, w, _seed(dropout), EPS, DROPOUT if dropout else 0.0, needs

        return args

    return [
        (f"{m} x {n}, dropout {dropout}, needs {needs}", build(m, n, dropout, needs))
        for m in ROWS
        for n in FLORENCE
        for dropout in (False, True)
        # without dropout one gradient serves x and residual
        for needs in (
            _frozen(4) if dropout else _frozen(4, 1),
            _frozen(4, 2, 3) if dropout else _frozen(4, 1, 2, 3),
        )
    ]


def _rope() -> list[tuple[str, Build]]:
    def build(m: int, heads: tuple[int, int, int], rotary: int) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            h, kv, d = heads
            table = _empty(m, rotary, dtype=dtype)
            return _empty(m, h, d, dtype=dtype), _empty(m, kv, d, dtype=dtype), table, table

        return args

    models = [(heads, heads[2]) for heads in (*FLORENCE.values(), *GEMMA.values())]
    # the second half of the dimensions passing through is other models' way
    part = [(heads, heads[2] // 2) for heads in GEMMA.values()]
    return [
        (f"{m} x {heads}, rotary {rotary}", build(m, heads, rotary))
        for m in ROWS
        for heads, rotary in (*models, *part)
    ]


CALLS: dict[str, list[tuple[str, Build]]] = {
    "rms_norm": _rms_norm(),
    "rms_norm_backward": _rms_norm_backward(),
    "residual_rms_norm": _residual_rms_norm(),
    "residual_rms_norm_backward": _residual_rms_norm_backward(),
    "residual_layer_norm": _residual_layer_norm(),
    "residual_layer_norm_backward": _residual_layer_norm_backward(),
    "rope": _rope(),
    "rope_backward": _rope(),
}
