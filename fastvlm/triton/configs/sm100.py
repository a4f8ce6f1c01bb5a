"""Blackwell: compute capability 10 and 12."""

from fastvlm.triton.configs import Case, Table, tile

ATTENTION: Table = {}

MLP: Table = {}

# the first of each fits into the 99 KB of compute capability 12
_ROWS_16 = Case(
    [tile(16, 128, 64, 4, 4), tile(16, 64, 128, 4, 4), tile(16, 128, 128, 4, 4)],
    lambda rows, wide: rows <= 16 and not wide,
)
_ROWS_32 = Case(
    [tile(32, 128, 64, 4, 4), tile(32, 64, 128, 4, 3)], lambda rows, wide: rows <= 32 and not wide
)
_ROWS_64 = Case(
    [tile(64, 64, 64, 4, 4), tile(64, 128, 64, 4, 3), tile(64, 256, 64, 8, 4)],
    lambda rows, wide: rows <= 64 and not wide,
)
_ROWS = Case(
    [tile(128, 128, 64, 8, 3), tile(128, 256, 64, 8, 3), tile(128, 256, 64, 8, 4)],
    lambda rows, wide: not wide,
)
# a wider tile and the sums it is added to do not fit into the registers
_ROWS_SUMMED = Case(
    [tile(128, 128, 64, 8, 3), tile(128, 128, 64, 8, 4)], lambda rows, wide: not wide
)
_ROWS_RANKED = Case(
    [tile(64, 128, 64, 4, 3), tile(128, 128, 64, 8, 4)], lambda rows, wide: not wide
)
_FLOAT32_16 = Case([tile(16, 64, 32, 4, 4), tile(16, 64, 64, 4, 4)], lambda rows, wide: rows <= 16)
_FLOAT32 = Case([tile(64, 64, 16, 4, 4), tile(64, 128, 32, 8, 3)])

_BY_ROWS = [_ROWS_16, _ROWS_32, _ROWS_64, _ROWS, _FLOAT32_16, _FLOAT32]

LOSS: Table = {
    "linear_cross_entropy": _BY_ROWS,
    "linear_cross_entropy_dlogits": _BY_ROWS,
    "linear_cross_entropy_dh": [_ROWS_16, _ROWS_32, _ROWS_64, _ROWS_SUMMED, _FLOAT32_16, _FLOAT32],
    # its rows are tokens of the vocabulary: many, however few rows there are
    "linear_cross_entropy_dweight": [_ROWS, _FLOAT32],
    "linear_topk": [_ROWS_16, _ROWS_32, _ROWS_RANKED, _FLOAT32_16, _FLOAT32],
}
