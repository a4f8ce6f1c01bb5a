"""Consumer GPUs: compute capability 8.6, 8.9 and 12, 99 KiB of shared memory a block."""

from dataclasses import replace

from fastvlm.triton.configs import Case, Config, Table, sm80
from fastvlm.triton.configs.heads import attention, block, keys
from fastvlm.triton.configs.products import tile

ATTENTION: Table = attention(
    few=([block(16, 64, 4, 2), block(16, 32, 4, 2)], [block(16, 128, 4, 2), block(16, 64, 4, 3)]),
    some=([block(32, 32, 4, 1)], [block(32, 64, 4, 2)]),
    forward=(
        [block(64, 32, 8, 1), block(32, 32, 4, 1)],
        [block(64, 32, 8, 2), block(32, 32, 4, 1)],
        [block(128, 64, 8, 2), block(64, 32, 4, 2)],
    ),
    backward_q=(
        [block(32, 32, 8, 1), block(32, 16, 4, 1)],
        [block(64, 64, 8, 2), block(64, 32, 8, 1)],
        [block(64, 64, 4, 2), block(64, 32, 4, 2)],
    ),
    backward_kv=(
        [block(32, 32, 8, 1), block(32, 16, 4, 1)],
        [block(32, 64, 8, 2), block(32, 32, 4, 1)],
        [block(32, 64, 8, 2), block(32, 32, 4, 1)],
    ),
    cached=([keys(32, 4, 2), keys(64, 4, 2)], [keys(64, 4, 2), keys(32, 4, 2)]),
)

# The A100's tables of products were made for as much shared memory as there is here. No grid is
# persistent here: on compute capability 12 the walk takes registers, so that a multiprocessor holds
# one program of gelu_forward instead of two, or spills. Tiles that spill there anyway are left out.
_SPILLING = (
    ("geglu_forward", 64, 32, 32),
    ("low_precision_linear", 128, 128, 32),
)


def _fitting(kernel: str, configs: list[Config]) -> list[Config]:
    sizes = [
        (kernel, *(c.blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))) for c in configs
    ]
    return [replace(c, resident=0) for c, size in zip(configs, sizes) if size not in _SPILLING]


MLP: Table = {
    kernel: [Case(_fitting(kernel, case.configs), case.when) for case in cases]
    for kernel, cases in sm80.MLP.items()
}

# of the A100's tiles these do without local memory on compute capability 12: ranking takes
# registers, and so do a bias beside a softcap and the gradients of logits in float32
_SIXTEEN_BITS = sm80.LOSS["linear_cross_entropy"][:4]
LOSS: Table = {
    **sm80.LOSS,
    "linear_cross_entropy": [
        *_SIXTEEN_BITS,
        Case([tile(16, 128, 32, 4, 4), tile(16, 64, 64, 4, 4)], lambda rows, wide: rows <= 16),
        Case([tile(64, 64, 16, 4, 4)]),
    ],
    "linear_cross_entropy_dlogits": [
        *_SIXTEEN_BITS,
        Case([tile(16, 64, 64, 4, 4)], lambda rows, wide: rows <= 16),
        Case([tile(64, 64, 16, 4, 4), tile(64, 128, 32, 8, 3)]),
    ],
    "linear_topk": [
        Case([tile(16, 128, 64, 4, 4)], lambda rows, wide: rows <= 16 and not wide),
        Case([tile(32, 64, 128, 4, 3)], lambda rows, wide: rows <= 32 and not wide),
        Case([tile(64, 128, 32, 8, 4)], lambda rows, wide: not wide),
        Case([tile(16, 128, 32, 4, 4)], lambda rows, wide: rows <= 16),
        Case([tile(64, 64, 16, 4, 4), tile(64, 128, 32, 8, 3)]),
    ],
}
