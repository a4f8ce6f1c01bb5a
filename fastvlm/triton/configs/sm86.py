"""Consumer GPUs: compute capability 8.6, 8.9 and 12, 99 KiB of shared memory a block."""

from fastvlm.triton.configs import Case, Config, Table, sm80

_HALF, _FULL = 2, 4  # bytes of an element: 16-bit dtypes, float32


def _config(m: int, n: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)


ATTENTION: Table = {
    "attention_forward": [
        Case([_config(16, 32, 4, 1)], lambda size, d, rows: size == _FULL and d > 128),
        Case([_config(32, 32, 4, 1)], lambda size, d, rows: size == _FULL),
        # decoding: few rows, so the keys go by as fast as memory gives them
        Case(
            [_config(16, 64, 4, 2), _config(16, 32, 4, 2)],
            lambda size, d, rows: rows <= 16 and d > 128,
        ),
        Case([_config(16, 128, 4, 2), _config(16, 64, 4, 2)], lambda size, d, rows: rows <= 16),
        Case([_config(32, 64, 4, 2)], lambda size, d, rows: rows <= 32),
        Case([_config(32, 32, 4, 1), _config(64, 32, 8, 1)], lambda size, d, rows: d > 128),
        Case([_config(64, 64, 4, 1), _config(128, 32, 8, 2)], lambda size, d, rows: d > 64),
        Case([_config(128, 64, 4, 2), _config(64, 64, 4, 2)]),
    ],
    "attention_backward_q": [
        Case([_config(16, 32, 4, 1)], lambda size, d, rows: size == _FULL and d > 128),
        Case([_config(32, 32, 4, 1)], lambda size, d, rows: size == _FULL),
        Case([_config(32, 32, 4, 1), _config(32, 16, 4, 1)], lambda size, d, rows: d > 128),
        Case([_config(64, 32, 4, 1), _config(64, 64, 8, 1)], lambda size, d, rows: d > 64),
        Case([_config(64, 64, 4, 1), _config(128, 32, 4, 2)]),
    ],
    "attention_backward_kv": [
        Case([_config(16, 16, 4, 1)], lambda size, d, rows: size == _FULL and d > 128),
        Case([_config(32, 32, 4, 1)], lambda size, d, rows: size == _FULL),
        Case([_config(16, 32, 4, 1), _config(16, 16, 4, 1)], lambda size, d, rows: d > 128),
        Case([_config(32, 32, 4, 1), _config(32, 64, 8, 1)], lambda size, d, rows: d > 64),
        Case([_config(32, 64, 4, 2), _config(64, 64, 4, 1)]),
    ],
    "cached_attention": [
        Case([Config({"BLOCK_N": 32}, 4, 1)], lambda size, d, rows: size == _FULL),
        Case(
            [Config({"BLOCK_N": 64}, 4, 2), Config({"BLOCK_N": 32}, 2, 2)],
            lambda size, d, rows: d > 128,
        ),
        Case([Config({"BLOCK_N": 64}, 2, 2), Config({"BLOCK_N": 128}, 4, 2)]),
    ],
}

# the A100's tables of products were made for as much shared memory as there is here
MLP: Table = sm80.MLP

LOSS: Table = sm80.LOSS
