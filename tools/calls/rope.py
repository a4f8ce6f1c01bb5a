"""Calls of rope."""

from __future__ import annotations

from typing import Any

import torch

from tools.calls.shapes import FLORENCE, GEMMA, ROWS, Build, empty


def _rope() -> list[tuple[str, Build]]:
    def build(m: int, heads: tuple[int, int, int], rotary: int) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            h, kv, d = heads
            table = empty(m, rotary, dtype=dtype)
            return empty(m, h, d, dtype=dtype), empty(m, kv, d, dtype=dtype), table, table

        return args

    models = [(heads, heads[2]) for heads in (*FLORENCE.values(), *GEMMA.values())]
    # the second half of the dimensions passing through is other models' way
    part = [(heads, heads[2] // 2) for heads in GEMMA.values()]
    return [
        (f"{m} x {heads}, rotary {rotary}", build(m, heads, rotary))
        for m in ROWS
        for heads, rotary in (*models, *part)
    ]


CALLS = {"rope": _rope(), "rope_backward": _rope()}
