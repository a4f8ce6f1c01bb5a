"""Functions of numbers that the kernels share."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """0 where it is subnormal, to keep which tl.exp has three instructions more."""
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """tanh by one exponential and one division: right to a rounding of 1.

    For small x that is few of its digits. ACCURATE, for float32 inputs, keeps them: below 0.65 a
    polynomial (interpolated at the Chebyshev nodes of x^2 in [0, 0.4225], off by 9e-10 of the
    result), above it a quotient that does not cancel.
    """
    if ACCURATE:
        z = x * x
        p = -0.00827245693653822 + z * 0.0022149027790874243
        p = 0.021746186539530754 + z * p
        p = -0.053956348448991776 + z * p
        p = 0.13333290815353394 + z * p
        p = -0.3333333432674408 + z * p
        e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        large = (1.0 - e) / (1.0 + e)
        t = tl.where(z < 0.4225, x + x * (z * p), tl.where(x < 0, -large, large))
    else:
        t = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    return t


@triton.jit
def below_cap(x, cap):
    """s of cap * tanh(x / cap) = cap - 2 cap s, of which 4 s (1 - s) is the slope.

    As right as `tanh` that is not ACCURATE, and without a division by cap for each x.
    """
    return 1.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E / cap)))


@triton.jit
def product(acc, a, b, CHUNK: tl.constexpr, PRECISION: tl.constexpr, ACCURATE: tl.constexpr):
    """acc + a @ b in float32: acc [M, N], a [M, K], b [K, N].

    ACCURATE, for float32 inputs, sums CHUNK products at a time and then those sums: one chain of
    additions over a whole head, or over all keys, would gather twice the rounding errors.
    """
    if ACCURATE:
        M: tl.constexpr = a.shape[0]
        K: tl.constexpr = a.shape[1]
        N: tl.constexpr = b.shape[1]
        chunks_a = tl.permute(tl.reshape(a, [M, K // CHUNK, CHUNK]), [1, 0, 2])
        chunks_b = tl.reshape(b, [K // CHUNK, CHUNK, N])
        acc += tl.sum(tl.dot(chunks_a, chunks_b, input_precision=PRECISION), 0)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc
