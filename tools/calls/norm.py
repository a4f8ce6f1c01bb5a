"""Calls of the norms."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from tools.calls.shapes import (
    DROPOUT,
    EPS,
    FLORENCE,
    GEMMA,
    OFFSET,
    ROWS,
    TRAINING,
    WIDE_LAYER,
    WIDE_LAYER_BACKWARD,
    WIDE_RMS,
    WIDE_RMS_BACKWARD,
    Build,
    empty,
    frozen,
    seed,
)


def _sizes(models: Iterable[int], wide: tuple[int, ...]) -> list[tuple[int, int]]:
    """Rows and widths: those of the models, and in training the widest that a kernel takes."""
    return [*((m, n) for m in ROWS for n in models), *((TRAINING, n) for n in wide)]


def _rms_norm() -> list[tuple[str, Build]]:
    def build(m: int, n: int) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            return empty(m, n, dtype=dtype), empty(n, dtype=dtype), EPS, OFFSET

        return args

    return [(f"{m} x {n}", build(m, n)) for m, n in _sizes((*FLORENCE, *GEMMA), WIDE_RMS)]


def _rms_norm_backward() -> list[tuple[str, Build]]:
    def build(m: int, n: int, needs: list[bool]) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            x = empty(m, n, dtype=dtype)
            return x, x, empty(n, dtype=dtype), EPS, OFFSET, needs

        return args

    return [
        (f"{m} x {n}, needs {needs}", build(m, n, needs))
        for m, n in _sizes((*FLORENCE, *GEMMA), WIDE_RMS_BACKWARD)
        for needs in (frozen(2), frozen(2, 1), frozen(2, 0))
    ]


def _residual_rms_norm() -> list[tuple[str, Build]]:
    def build(m: int, n: int, gate: bool, following: bool) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            x, w = empty(m, n, dtype=dtype), empty(n, dtype=dtype)
            g = empty(1, dtype=dtype) if gate else None
            return x, x, w, g, w if following else None, EPS, OFFSET

        return args

    return [
        (f"{m} x {n}, gate {gate}, next {following}", build(m, n, gate, following))
        for m, n in _sizes((*FLORENCE, *GEMMA), WIDE_RMS)
        for gate, following in itertools.product((False, True), repeat=2)
    ]


def _residual_rms_norm_backward() -> list[tuple[str, Build]]:
    def build(
        m: int, n: int, gate: bool, following: bool, grad_h: bool, needs: list[bool]
    ) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            x, w = empty(m, n, dtype=dtype), empty(n, dtype=dtype)
            gh, gy = x if grad_h else None, x if following else None
            g = empty(1, dtype=dtype) if gate else None
            return gh, gy, x, x, w, g, w if following else None, EPS, OFFSET, needs

        return args

    return [
        (
            f"{m} x {n}, gate {gate}, next {following}, grad_h {grad_h}, needs {needs}",
            build(m, n, gate, following, grad_h, needs),
        )
        for m, n in _sizes((*FLORENCE, *GEMMA), WIDE_RMS_BACKWARD)
        for gate, following in itertools.product((False, True), repeat=2)
        # the last layer's h has no reader beside y; all train, the weights are frozen, and, as in a
        # frozen decoder, only the gate trains
        for grad_h, needs in (
            (True, frozen(5)),
            (True, frozen(5, 2, 3, 4)),
            *([(True, frozen(5, 2, 4))] if gate else []),
            *([(False, frozen(5))] if following else []),
        )
    ]


def _residual_layer_norm() -> list[tuple[str, Build]]:
    def build(m: int, n: int, dropout: bool) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            x, w = empty(m, n, dtype=dtype), empty(n, dtype=dtype)
            return x, x, w, w, seed(dropout), EPS, DROPOUT if dropout else 0.0

        return args

    return [
        (f"{m} x {n}, dropout {dropout}", build(m, n, dropout))
        for m, n in _sizes(FLORENCE, WIDE_LAYER)
        for dropout in (False, True)
    ]


def _residual_layer_norm_backward() -> list[tuple[str, Build]]:
    def build(m: int, n: int, dropout: bool, needs: list[bool]) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            x, w = empty(m, n, dtype=dtype), empty(n, dtype=dtype)
            return x, x, x, w, seed(dropout), EPS, DROPOUT if dropout else 0.0, needs

        return args

    return [
        (f"{m} x {n}, dropout {dropout}, needs {needs}", build(m, n, dropout, needs))
        for m, n in _sizes(FLORENCE, WIDE_LAYER_BACKWARD)
        for dropout in (False, True)
        # without dropout one gradient serves x and residual
        for needs in (
            frozen(4) if dropout else frozen(4, 1),
            frozen(4, 2, 3) if dropout else frozen(4, 1, 2, 3),
        )
    ]


CALLS = {
    "rms_norm": _rms_norm(),
    "rms_norm_backward": _rms_norm_backward(),
    "residual_rms_norm": _residual_rms_norm(),
    "residual_rms_norm_backward": _residual_rms_norm_backward(),
    "residual_layer_norm": _residual_layer_norm(),
    "residual_layer_norm_backward": _residual_layer_norm_backward(),
}
