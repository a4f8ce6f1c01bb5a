"""AMD CDNA: gfx90a and gfx942."""

from fastvlm.triton.configs import Table
from fastvlm.triton.configs.products import cases, stored_cases, tile

ATTENTION: Table = {}

# 64 KB of local memory; one tile of each factor on its way while another is multiplied.
MLP: Table = {
    "geglu_forward": cases(
        few=[tile(16, 32, 128, warps=4, stages=2), tile(16, 64, 64, warps=4, stages=2)],
        some=[tile(64, 64, 64, warps=4, stages=2, slices=2)],
        many=[
            tile(128, 64, 64, warps=8, stages=2, slices=2),
            tile(128, 128, 32, warps=8, stages=2, slices=4),
        ],
        float32_few=[tile(16, 32, 64, warps=4, stages=2)],
        float32=[tile(64, 64, 32, warps=4, stages=2, slices=2)],
    ),
    **dict.fromkeys(
        ("gelu_forward", "geglu_backward", "gelu_backward"),
        cases(
            few=[tile(16, 32, 128, warps=4, stages=2), tile(16, 64, 64, warps=4, stages=2)],
            some=[tile(64, 64, 64, warps=4, stages=2, slices=2)],
            many=[
                tile(128, 64, 64, warps=8, stages=2, slices=2),
                tile(128, 128, 32, warps=8, stages=2, slices=4),
            ],
            float32_few=[tile(16, 32, 64, warps=4, stages=2)],
            float32=[tile(64, 64, 32, warps=4, stages=2, slices=2)],
        ),
    ),
    "low_precision_linear": stored_cases(
        split_few=[tile(16, 16, 128, warps=1, stages=2)],
        split=[tile(64, 64, 32, warps=4, stages=2), tile(64, 128, 32, warps=8, stages=2)],
        narrow=[tile(16, 16, 256, warps=1, stages=2), tile(16, 16, 512, warps=2, stages=2)],
        few=[tile(16, 32, 128, warps=2, stages=2), tile(16, 64, 128, warps=4, stages=2)],
        some=[tile(64, 64, 64, warps=4, stages=2)],
        many=[tile(128, 128, 32, warps=8, stages=2), tile(64, 128, 32, warps=4, stages=2)],
    ),
}

LOSS: Table = {}
