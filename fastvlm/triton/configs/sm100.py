"""Blackwell data-centre GPUs: compute capability 10, 227 KiB of shared memory a block."""

from fastvlm.triton.configs import Case, Table
from fastvlm.triton.configs.heads import attention, block, keys
from fastvlm.triton.configs.products import cases, sliced, stored_cases, tile

ATTENTION: Table = attention(
    few=([block(16, 64, 4, 2), block(16, 32, 4, 2)], [block(16, 128, 4, 2), block(16, 64, 4, 2)]),
    some=([block(32, 32, 4, 1)], [block(32, 64, 4, 2)]),
    forward=(
        [block(64, 32, 8, 2), block(64, 32, 8, 1)],
        [block(128, 32, 8, 2), block(64, 32, 8, 2)],
        [block(128, 64, 8, 2), block(64, 64, 4, 2)],
    ),
    backward_q=(
        [block(64, 32, 8, 1), block(32, 32, 8, 1)],
        [block(64, 64, 8, 2), block(64, 32, 4, 2)],
        [block(64, 64, 4, 2), block(128, 64, 8, 2)],
    ),
    backward_kv=(
        [block(64, 32, 8, 2), block(32, 32, 8, 1)],
        [block(64, 64, 8, 1), block(32, 32, 4, 2)],
        [block(32, 64, 4, 2), block(64, 64, 4, 2)],
    ),
    cached=([keys(64, 4, 2), keys(32, 4, 2)], [keys(32, 4, 2), keys(32, 2, 2)]),
)

# From 64 rows on, the sums are in tensor memory and reach the registers in slices.
MLP: Table = {
    "geglu_forward": cases(
        few=[
            sliced(16, 32, 128, warps=4, stages=3),
            sliced(16, 64, 64, warps=4, stages=4),
        ],
        some=[
            sliced(64, 64, 64, warps=4, stages=4, slices=2),
            sliced(64, 32, 64, warps=4, stages=4),
        ],
        many=[
            sliced(128, 128, 64, warps=8, stages=3, slices=4, resident=1),
            sliced(128, 128, 64, warps=8, stages=4, slices=4, resident=1),
            sliced(128, 64, 64, warps=8, stages=3, slices=4, resident=2),
        ],
        float32_few=[sliced(16, 32, 64, warps=4, stages=3)],
        float32=[
            sliced(64, 64, 32, warps=8, stages=2, slices=2),
            sliced(128, 64, 32, warps=8, stages=2, slices=4),
        ],
    ),
    "gelu_forward": cases(
        few=[sliced(16, 16, 256, warps=2, stages=4), sliced(16, 32, 128, warps=4, stages=4)],
        some=[
            sliced(64, 64, 64, warps=4, stages=4, slices=4),
            sliced(64, 32, 64, warps=4, stages=4),
        ],
        many=[
            sliced(128, 128, 64, warps=8, stages=3, slices=8, resident=2),
            sliced(128, 256, 64, warps=8, stages=3, slices=8, resident=1),
            sliced(128, 128, 64, warps=8, stages=4, slices=8, resident=1),
        ],
        float32_few=[sliced(16, 32, 64, warps=4, stages=3)],
        float32=[
            sliced(64, 64, 32, warps=8, stages=2, slices=4),
            sliced(128, 64, 32, warps=8, stages=2, slices=4),
        ],
    ),
    **dict.fromkeys(
        ("geglu_backward", "gelu_backward"),
        cases(
            few=[sliced(16, 64, 64, warps=4, stages=4), sliced(16, 32, 128, warps=4, stages=3)],
            some=[
                sliced(64, 64, 64, warps=4, stages=4, slices=4),
                sliced(64, 128, 64, warps=4, stages=3, slices=8),
            ],
            many=[
                sliced(128, 128, 64, warps=8, stages=3, slices=8),
                sliced(128, 256, 64, warps=8, stages=3, slices=8),
                sliced(128, 128, 64, warps=8, stages=4, slices=8),
            ],
            float32_few=[sliced(16, 32, 64, warps=4, stages=3)],
            float32=[
                sliced(64, 64, 32, warps=8, stages=2, slices=4),
                sliced(128, 64, 32, warps=8, stages=2, slices=4),
            ],
        ),
    ),
    "low_precision_linear": stored_cases(
        split_few=[sliced(16, 16, 128, warps=1, stages=4), sliced(16, 32, 128, warps=2, stages=4)],
        split=[sliced(64, 64, 32, warps=4, stages=4), sliced(64, 128, 32, warps=8, stages=3)],
        narrow=[sliced(16, 16, 256, warps=1, stages=4), sliced(16, 16, 512, warps=2, stages=3)],
        few=[sliced(16, 32, 128, warps=2, stages=4), sliced(16, 64, 128, warps=4, stages=4)],
        some=[sliced(64, 64, 64, warps=4, stages=3), sliced(64, 32, 128, warps=8, stages=3)],
        many=[sliced(128, 128, 64, warps=8, stages=3), sliced(64, 128, 64, warps=8, stages=3)],
    ),
}

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
_ROWS_32_RANKED = Case([tile(32, 64, 128, 4, 3)], lambda rows, wide: rows <= 32 and not wide)
_ROWS_RANKED = Case(
    [tile(64, 128, 64, 4, 3), tile(128, 128, 64, 8, 4)], lambda rows, wide: not wide
)
_FLOAT32_16 = Case([tile(16, 64, 32, 4, 4), tile(16, 64, 64, 4, 4)], lambda rows, wide: rows <= 16)
_FLOAT32_RANKED = Case([tile(64, 64, 16, 4, 4)])
_FLOAT32 = Case([tile(64, 64, 16, 4, 4), tile(64, 64, 32, 8, 3)])

_BY_ROWS = [_ROWS_16, _ROWS_32, _ROWS_64, _ROWS, _FLOAT32_16, _FLOAT32]

LOSS: Table = {
    "linear_cross_entropy": [*_BY_ROWS[:3], _ROWS_SUMMED, *_BY_ROWS[4:]],
    "linear_cross_entropy_dlogits": _BY_ROWS,
    "linear_cross_entropy_dh": [*_BY_ROWS[:3], _ROWS_SUMMED, *_BY_ROWS[4:]],
    # its rows are tokens of the vocabulary: many, however few rows there are
    "linear_cross_entropy_dweight": [_ROWS, _FLOAT32],
    "linear_topk": [_ROWS_16, _ROWS_32_RANKED, _ROWS_RANKED, _FLOAT32_16, _FLOAT32_RANKED],
}
