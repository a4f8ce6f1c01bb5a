"""Counter-based dropout: the same bits as `fastvlm.reference._random`, on every backend."""

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def kept(seed, counter, threshold):
    """Whether elements are kept: the upper 53 bits of splitmix64(seed + counter) >= threshold.

    seed and threshold int64, counter int64 of any shape.
    """
    z = (counter + 1).to(tl.uint64) * _GOLDEN + seed.to(tl.uint64)
    z = (z ^ (z >> 30)) * _MIX1
    z = (z ^ (z >> 27)) * _MIX2
    z = z ^ (z >> 31)
    return (z >> 11).to(tl.int64) >= threshold
