"""GELU and its slope in float32, in terms that do not cancel."""

import triton
import triton.language as tl

# 2 u = x (A + B x^2) of the tanh form: A = 2 sqrt(2 / pi), B = 0.044715 A
_A = tl.constexpr(1.5957691216057308)
_B = tl.constexpr(0.07135481627260025)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)


@triton.jit
def _near(x):
    """x where the tanh form is not 0 or x itself, so that no power of it overflows."""
    return tl.minimum(tl.maximum(x, -16.0), 16.0)


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """x Phi(x). The tanh form is x sigmoid(2 u): 1 + tanh(u) would lose what is left of a tail."""
    if TANH:
        near = _near(x)
        return x / (1.0 + tl.exp(-near * (_A + _B * near * near)))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))


@triton.jit
def gelu_and_slope(x, TANH: tl.constexpr):
    """gelu(x) and its derivative, which share their one transcendental."""
    if TANH:
        near = _near(x)
        square = near * near
        twice = near * (_A + _B * square)
        e = tl.exp(-tl.abs(twice))  # of the magnitude: both halves of the sigmoid are exact
        large = 1.0 / (1.0 + e)
        share = tl.where(twice < 0, e * large, large)
        slope = share + near * (_A + 3.0 * _B * square) * (e * large * large)
        return x * share, slope
    else:
        share = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        return x * share, share + x * (_DENSITY_AT_0 * tl.exp(-0.5 * x * x))
