"""AMD CDNA: gfx90a and gfx942, 64 KiB of local memory a block."""

from fastvlm.triton.configs import Case, Table
from fastvlm.triton.configs.heads import attention, block, keys
from fastvlm.triton.configs.products import cases, sliced, stored_cases, tile

ATTENTION: Table = attention(
    few=([block(16, 32, 4, 1)], [block(16, 64, 4, 1), block(16, 32, 4, 1)]),
    some=([block(32, 32, 4, 1)], [block(32, 32, 4, 1)]),
    forward=(
        [block(64, 16, 4, 1)],
        [block(128, 32, 8, 2), block(64, 32, 4, 2)],
        [block(128, 32, 4, 2), block(64, 32, 4, 2)],
    ),
    backward_q=(
        [block(32, 16, 4, 1)],
        [block(64, 32, 8, 1)],
        [block(64, 32, 4, 2), block(32, 32, 4, 1)],
    ),
    backward_kv=(
        [block(16, 32, 8, 1), block(16, 16, 4, 1)],
        [block(32, 32, 4, 1)],
        [block(32, 64, 4, 2)],
    ),
    cached=([keys(32, 4, 2)], [keys(64, 4, 2), keys(32, 4, 2)]),
    # of 64 lanes: four have all registers of a compute unit
    wide_warps=4,
    wide_apart=True,
)

# 64 KB of local memory; one tile of each factor on its way while another is multiplied.
MLP: Table = {
    "geglu_forward": cases(
        few=[sliced(16, 32, 128, warps=4, stages=2), sliced(16, 64, 64, warps=4, stages=2)],
        some=[sliced(64, 64, 64, warps=4, stages=2, slices=2)],
        many=[
            sliced(128, 64, 64, warps=8, stages=2, slices=2, resident=2),
            sliced(128, 128, 32, warps=8, stages=2, slices=4, resident=1),
        ],
        float32_few=[sliced(16, 32, 64, warps=4, stages=2)],
        float32=[sliced(64, 64, 32, warps=4, stages=2, slices=2)],
    ),
    "gelu_forward": cases(
        few=[sliced(16, 32, 128, warps=4, stages=2), sliced(16, 64, 64, warps=4, stages=2)],
        some=[sliced(64, 64, 64, warps=4, stages=2, slices=2)],
        many=[
            sliced(128, 64, 64, warps=8, stages=2, slices=2, resident=2),
            sliced(128, 128, 32, warps=8, stages=2, slices=4, resident=1),
        ],
        float32_few=[sliced(16, 32, 64, warps=4, stages=2)],
        float32=[sliced(64, 64, 32, warps=4, stages=2, slices=2)],
    ),
    **dict.fromkeys(
        ("geglu_backward", "gelu_backward"),
        cases(
            few=[sliced(16, 32, 128, warps=4, stages=2), sliced(16, 64, 64, warps=4, stages=2)],
            some=[sliced(64, 64, 64, warps=4, stages=2, slices=2)],
            many=[
                sliced(128, 64, 64, warps=8, stages=2, slices=2),
                sliced(128, 128, 32, warps=8, stages=2, slices=4),
            ],
            float32_few=[sliced(16, 32, 64, warps=4, stages=2)],
            float32=[sliced(64, 64, 32, warps=4, stages=2, slices=2)],
        ),
    ),
    "low_precision_linear": stored_cases(
        split_few=[sliced(16, 16, 128, warps=1, stages=2)],
        split=[sliced(64, 64, 32, warps=4, stages=2), sliced(64, 128, 32, warps=8, stages=2)],
        narrow=[sliced(16, 16, 256, warps=1, stages=2), sliced(16, 16, 512, warps=2, stages=2)],
        few=[sliced(16, 32, 128, warps=2, stages=2), sliced(16, 64, 128, warps=4, stages=2)],
        some=[sliced(64, 64, 64, warps=4, stages=2)],
        many=[sliced(128, 128, 32, warps=8, stages=2), sliced(64, 128, 32, warps=4, stages=2)],
    ),
}

# 64 KB of LDS
_ROWS_16 = Case(
    [tile(16, 64, 128, 4, 2), tile(16, 128, 64, 4, 2)], lambda rows, wide: rows <= 16 and not wide
)
_ROWS_32 = Case(
    [tile(32, 64, 64, 4, 2), tile(32, 128, 64, 4, 2)], lambda rows, wide: rows <= 32 and not wide
)
_ROWS_64 = Case(
    [tile(64, 128, 32, 4, 2), tile(64, 64, 64, 4, 2)], lambda rows, wide: rows <= 64 and not wide
)
_ROWS = Case(
    [tile(128, 128, 32, 4, 2), tile(128, 128, 64, 8, 2), tile(256, 128, 32, 8, 2)],
    lambda rows, wide: not wide,
)
_ROWS_RANKED = Case([tile(64, 64, 64, 4, 2), tile(64, 128, 32, 4, 2)], lambda rows, wide: not wide)
_FLOAT32_16 = Case([tile(16, 128, 32, 4, 2), tile(16, 64, 64, 4, 2)], lambda rows, wide: rows <= 16)
_FLOAT32 = Case([tile(64, 64, 16, 4, 2), tile(128, 64, 16, 4, 2)])

_BY_ROWS = [_ROWS_16, _ROWS_32, _ROWS_64, _ROWS, _FLOAT32_16, _FLOAT32]

LOSS: Table = {
    "linear_cross_entropy": _BY_ROWS,
    "linear_cross_entropy_dlogits": _BY_ROWS,
    "linear_cross_entropy_dh": _BY_ROWS,
    # its rows are tokens of the vocabulary: many, however few rows there are
    "linear_cross_entropy_dweight": [_ROWS, _FLOAT32],
    "linear_topk": [_ROWS_16, _ROWS_32, _ROWS_RANKED, _FLOAT32_16, _FLOAT32],
}
