"""Consumer GPUs: compute capability 8.6, 8.9 and 12, 99 KiB of shared memory a block."""

from fastvlm.triton.configs import Table, sm80
from fastvlm.triton.configs.heads import attention, block, keys

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

# the A100's tables of products were made for as much shared memory as there is here
MLP: Table = sm80.MLP

LOSS: Table = sm80.LOSS
