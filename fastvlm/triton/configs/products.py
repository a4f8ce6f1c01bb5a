"""What the tables of matrix products share: how a tile is written, and the cases of a product."""

from __future__ import annotations

from fastvlm.triton.configs import Case, Config


def tile(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    """m by n results of a program, k of the sum at a time."""
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, warps, stages)


def sliced(
    m: int, n: int, k: int, *, warps: int, stages: int, slices: int = 1, group: int = 8,
    resident: int = 0,
) -> Config:  # fmt: skip
    """A tile whose program takes its epilogue in slices of columns, for the MLP kernels."""
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": group, "SLICES": slices}
    return Config(blocks, warps, stages, resident=resident)


def cases(
    *,
    few: list[Config],
    some: list[Config],
    many: list[Config],
    float32_few: list[Config],
    float32: list[Config],
) -> list[Case]:
    """few rows: a decoding step's, up to 16. some: up to 64. Of 16 bits where nothing is said."""
    return [
        Case(float32_few, lambda bits, rows, **_: bits == 32 and rows <= 16),
        Case(float32, lambda bits, **_: bits == 32),
        Case(few, lambda rows, **_: rows <= 16),
        Case(some, lambda rows, **_: rows <= 64),
        Case(many),
    ]


def stored_cases(
    *,
    split_few: list[Config],
    split: list[Config],
    narrow: list[Config],
    few: list[Config],
    some: list[Config],
    many: list[Config],
    some_int8: list[Config] | None = None,
) -> list[Case]:
    """low_precision_linear. split: rows of several terms, which take registers.

    narrow: few rows, and so few columns that wider tiles would leave multiprocessors idle.
    """
    return [
        Case(split_few, lambda rows, terms, **_: rows <= 16 and terms > 1),
        Case(split, lambda terms, **_: terms > 1),
        Case(narrow, lambda rows, columns, **_: rows <= 16 and columns <= 4096),
        Case(few, lambda rows, **_: rows <= 16),
        *(
            [Case(some_int8, lambda rows, stored, **_: rows <= 64 and stored == 8)]
            if some_int8
            else []
        ),
        Case(some, lambda rows, **_: rows <= 64),
        Case(many),
    ]
