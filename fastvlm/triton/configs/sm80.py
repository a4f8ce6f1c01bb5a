"""Ampere, Ada and the consumer's Blackwell: compute capability 8 and 12."""

from fastvlm.triton.configs import Table
from fastvlm.triton.configs.products import cases, stored_cases, tile

ATTENTION: Table = {}

# At most 99 KB of shared memory: 8.0 has 163 KB, but 8.6, 8.9 and 12 have no more.
MLP: Table = {
    "geglu_forward": cases(
        few=[
            tile(16, 32, 128, warps=4, stages=3),
            tile(16, 16, 256, warps=4, stages=3),
            tile(16, 64, 64, warps=4, stages=4),
        ],
        some=[
            tile(64, 64, 64, warps=4, stages=3, slices=2),
            tile(64, 64, 32, warps=4, stages=4, slices=2),
        ],
        many=[
            tile(128, 64, 64, warps=8, stages=3, slices=4),
            tile(128, 64, 32, warps=8, stages=4, slices=4),
            tile(64, 64, 64, warps=4, stages=4, slices=2),
        ],
        float32_few=[tile(16, 32, 64, warps=4, stages=3)],
        float32=[
            tile(64, 32, 32, warps=8, stages=2, slices=2),
            tile(64, 64, 16, warps=8, stages=2, slices=4),
        ],
    ),
    "gelu_forward": cases(
        few=[tile(16, 16, 256, warps=2, stages=4), tile(16, 32, 128, warps=4, stages=4)],
        some=[tile(64, 64, 64, warps=4, stages=4, slices=4), tile(64, 32, 64, warps=4, stages=4)],
        many=[
            tile(128, 128, 32, warps=8, stages=4, slices=8),
            tile(128, 128, 64, warps=8, stages=3, slices=8),
            tile(128, 64, 64, warps=8, stages=3, slices=4),
        ],
        float32_few=[tile(16, 32, 64, warps=4, stages=3)],
        float32=[
            tile(64, 64, 32, warps=8, stages=2, slices=4),
            tile(64, 32, 32, warps=4, stages=2, slices=2),
        ],
    ),
    **dict.fromkeys(
        ("geglu_backward", "gelu_backward"),
        cases(
            few=[tile(16, 64, 64, warps=4, stages=4), tile(16, 32, 128, warps=4, stages=3)],
            some=[tile(64, 64, 64, warps=4, stages=4, slices=4)],
            many=[
                tile(128, 128, 32, warps=8, stages=4, slices=8),
                tile(128, 128, 64, warps=8, stages=3, slices=8),
                tile(128, 64, 64, warps=8, stages=3, slices=8),
            ],
            float32_few=[tile(16, 32, 64, warps=4, stages=3)],
            float32=[
                tile(64, 64, 32, warps=8, stages=2, slices=4),
                tile(64, 32, 32, warps=4, stages=2, slices=2),
            ],
        ),
    ),
    "low_precision_linear": stored_cases(
        split_few=[tile(16, 16, 128, warps=1, stages=4), tile(16, 32, 128, warps=2, stages=4)],
        split=[tile(64, 64, 32, warps=4, stages=4), tile(64, 128, 32, warps=8, stages=3)],
        narrow=[tile(16, 16, 256, warps=1, stages=4), tile(16, 16, 512, warps=2, stages=3)],
        few=[tile(16, 32, 128, warps=2, stages=4), tile(16, 64, 128, warps=4, stages=3)],
        some=[tile(64, 64, 64, warps=4, stages=3), tile(64, 32, 64, warps=4, stages=4)],
        many=[tile(64, 128, 64, warps=8, stages=3), tile(128, 128, 32, warps=8, stages=3)],
    ),
}

LOSS: Table = {}
