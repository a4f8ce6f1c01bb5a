"""Triton kernels with known faults, and one without, for the tool that must find them."""

import triton
import triton.language as tl


@triton.jit
def copy(X, OUT, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + at, mask=at < n), mask=at < n)


@triton.jit
def narrow(X, OUT, BLOCK: tl.constexpr):
    """Every second element: no two of a thread are neighbours."""
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + 2 * at))


@triton.jit
def spilling(X, OUT, BLOCK: tl.constexpr):
    """All of a row is live across the reduction; launched with fewer registers than that takes."""
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at).to(tl.float32)
    tl.store(OUT + at, x * tl.sum(x, 0))


@triton.jit
def product(A, B, OUT, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(A + m[:, None] * K + k[None, :])
    b = tl.load(B + k[:, None] * N + n[None, :])
    tl.store(OUT + m[:, None] * N + n[None, :], tl.dot(a, b))


@triton.jit
def broken(X):
    tl.static_assert(False, "planted")
