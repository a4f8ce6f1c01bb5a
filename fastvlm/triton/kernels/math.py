"""Elementwise functions that more than one kernel needs."""

import triton
import triton.language as tl


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """tanh of float32 x, from the hardware's exponential.

    ACCURATE: keeps its relative accuracy at small x, where the short form is off by 6e-8 of 1: for
    float32 inputs. 16-bit inputs bring larger errors along.
    """
    if not ACCURATE:
        return 1.0 - 2.0 / (1.0 + tl.exp2(2.8853900817779268 * x))
    z = x * x
    # below 1/4 the next term of the series is 1e-8 of the sum
    series = 2.0 / 15.0 + z * (-17.0 / 315.0 + z * (62.0 / 2835.0))
    series = x * (1.0 + z * (-1.0 / 3.0 + z * series))
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -large, large))
