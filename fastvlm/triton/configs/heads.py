"""What the tables of attention share: how a block is written, and the cases of a head.

Keys of the cases: size, bytes of an element; d, head_dim padded to a power of two; rows, the query
rows of an image and key/value head.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastvlm.triton.configs import Case, Config, Table

_FLOAT32 = 4


def block(rows: int, keys: int, warps: int, stages: int, *, apart: bool = False) -> Config:
    """apart: dK and dV by a launch each."""
    return Config({"BLOCK_M": rows, "BLOCK_N": keys}, warps, stages, apart)


def keys(count: int, warps: int, stages: int) -> Config:
    """Of cached_attention, where a program's rows are the heads of one group."""
    return Config({"BLOCK_N": count}, warps, stages)


def _float32(wide: list[Config], middle: list[Config], narrow: list[Config]) -> list[Case]:
    """Products on plain cores: blocks so small that their sums of sums fit into registers."""
    return [
        Case(wide, lambda size, d, rows: size == _FLOAT32 and d > 128),
        Case(middle, lambda size, d, rows: size == _FLOAT32 and d > 64),
        Case(narrow, lambda size, d, rows: size == _FLOAT32),
    ]


_CACHED_32 = [Case([keys(32, 8, 1)], lambda size, d, rows: size == _FLOAT32)]

Configs = Sequence[Config]


def _by_width(d256: Configs, d128: Configs, d64: Configs) -> list[Case]:
    return [
        Case(list(d256), lambda size, d, rows: d > 128),
        Case(list(d128), lambda size, d, rows: d > 64),
        Case(list(d64)),
    ]


def attention(
    *,
    few: tuple[Configs, Configs],
    some: tuple[Configs, Configs],
    forward: tuple[Configs, Configs, Configs],
    backward_q: tuple[Configs, Configs, Configs],
    backward_kv: tuple[Configs, Configs, Configs],
    cached: tuple[Configs, Configs],
    wide_warps: int = 8,
    wide_apart: bool = False,
) -> Table:
    """few: up to 16 rows, some: up to 32, and cached: for heads above 128 and below. The others:
    for heads above 128, above 64, and below. wide_warps: that share a block of the widest heads in
    float32, which is all registers; wide_apart: their dK and dV by a launch each."""
    small = [block(16, 16, 4, 1)]
    widest = [block(16, 16, wide_warps, 1)]
    widest_keys = [block(16, 16, wide_warps, 1, apart=wide_apart)]
    return {
        "attention_forward": [
            *_float32(widest, small, [block(32, 32, 4, 1)]),
            # decoding: few rows, so the keys go by as fast as memory gives them
            Case(list(few[0]), lambda size, d, rows: rows <= 16 and d > 128),
            Case(list(few[1]), lambda size, d, rows: rows <= 16),
            Case(list(some[0]), lambda size, d, rows: rows <= 32 and d > 128),
            Case(list(some[1]), lambda size, d, rows: rows <= 32),
            *_by_width(*forward),
        ],
        "attention_backward_q": [
            *_float32(widest, small, [block(16, 16, 8, 1)]),
            *_by_width(*backward_q),
        ],
        "attention_backward_kv": [
            *_float32(widest_keys, [block(16, 16, 8, 1)], small),
            *_by_width(*backward_kv),
        ],
        "cached_attention": [
            *_CACHED_32,
            Case(list(cached[0]), lambda size, d, rows: d > 128),
            Case(list(cached[1])),
        ],
    }
