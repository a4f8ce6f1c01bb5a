"""AMD CDNA: gfx90a and gfx942, 64 KiB of local memory a block."""

from fastvlm.triton.configs import Case, Config, Table
from fastvlm.triton.configs.products import cases, sliced, stored_cases, tile

_HALF, _FULL = 2, 4  # bytes of an element: 16-bit dtypes, float32


def _config(m: int, n: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)


ATTENTION: Table = {
    "attention_forward": [
        Case([_config(16, 32, 4, 1)], lambda size, d, rows: size == _FULL and d > 128),
        Case([_config(32, 32, 4, 1)], lambda size, d, rows: size == _FULL),
        # decoding: few rows, so the keys go by as fast as memory gives them
        Case(
            [_config(16, 64, 4, 1), _config(16, 32, 4, 1)],
            lambda size, d, rows: rows <= 16 and d > 128,
        ),
        Case([_config(16, 128, 4, 1), _config(16, 64, 4, 1)], lambda size, d, rows: rows <= 16),
        Case([_config(32, 64, 4, 1)], lambda size, d, rows: rows <= 32),
        Case([_config(64, 16, 4, 1), _config(128, 16, 8, 1)], lambda size, d, rows: d > 128),
        Case([_config(64, 32, 4, 1), _config(128, 32, 8, 1)], lambda size, d, rows: d > 64),
        Case([_config(128, 64, 4, 1), _config(64, 64, 4, 1)]),
    ],
    "attention_backward_q": [
        Case([_config(16, 32, 4, 1)], lambda size, d, rows: size == _FULL and d > 128),
        Case([_config(32, 32, 4, 1)], lambda size, d, rows: size == _FULL),
        Case([_config(32, 16, 4, 1)], lambda size, d, rows: d > 128),
        Case([_config(64, 32, 4, 1)], lambda size, d, rows: d > 64),
        Case([_config(64, 64, 4, 1)]),
    ],
    "attention_backward_kv": [
        Case([_config(16, 16, 4, 1)], lambda size, d, rows: size == _FULL and d > 128),
        Case([_config(32, 32, 4, 1)], lambda size, d, rows: size == _FULL),
        Case([_config(16, 16, 4, 1)], lambda size, d, rows: d > 128),
        Case([_config(16, 32, 4, 1), _config(32, 32, 4, 1)], lambda size, d, rows: d > 64),
        Case([_config(32, 64, 4, 1)]),
    ],
    "cached_attention": [
        Case([Config({"BLOCK_N": 32}, 4, 1)], lambda size, d, rows: size == _FULL),
        Case(
            [Config({"BLOCK_N": 64}, 4, 1), Config({"BLOCK_N": 32}, 2, 1)],
            lambda size, d, rows: d > 128,
        ),
        Case([Config({"BLOCK_N": 64}, 2, 1), Config({"BLOCK_N": 128}, 4, 1)]),
    ],
}

# 64 KB of local memory; one tile of each factor on its way while another is multiplied.
MLP: Table = {
    "geglu_forward": cases(
        few=[sliced(16, 32, 128, warps=4, stages=2), sliced(16, 64, 64, warps=4, stages=2)],
        some=[sliced(64, 64, 64, warps=4, stages=2, slices=2)],
        many=[
            sliced(128, 64, 64, warps=8, stages=2, slices=2),
            sliced(128, 128, 32, warps=8, stages=2, slices=4),
        ],
        float32_few=[sliced(16, 32, 64, warps=4, stages=2)],
        float32=[sliced(64, 64, 32, warps=4, stages=2, slices=2)],
    ),
    **dict.fromkeys(
        ("gelu_forward", "geglu_backward", "gelu_backward"),
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
