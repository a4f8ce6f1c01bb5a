"""One new token per row against a cache that is never reordered."""

import triton
import triton.language as tl

from fastvlm.triton.kernels.attention import put_tile, tile
from fastvlm.triton.kernels.math import product, tanh


@triton.jit(do_not_specialize=["stride_a", "rows", "heads", "window"])
def cached_attention(
    Q, K, V, OUT, STATS, LENGTHS, ANCESTRY,
    stride_qr, stride_qh, stride_kn, stride_kt, stride_kh, stride_vn, stride_vt, stride_vh,
    stride_a, rows, heads, window, inner, outer,
    D: tl.constexpr, GROUP: tl.constexpr, HAS_ANCESTRY: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    ACCURATE: tl.constexpr, EVEN: tl.constexpr, CHUNK_D: tl.constexpr, CHUNK_N: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """OUT [R, H, D]; with SPLITS > 1 a part of OUT and STATS for each split, float32.

    Program 0: the row. Program 1: key/value head * SPLITS + split. The query heads of the group are
    the rows of one product, so that each key and value is loaded once.
    """
    r = tl.program_id(0).to(tl.int64)
    head, split = tl.program_id(1).to(tl.int64) // SPLITS, tl.program_id(1) % SPLITS
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    real = g < GROUP
    q_head = head * GROUP + g
    q = tile(Q + r * stride_qr, q_head, stride_qh, d, real, D, EVEN)
    length = tl.load(LENGTHS + r)
    lo, hi = 0, length
    if HAS_WINDOW:
        lo = tl.maximum(length - window, 0)
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(hi - lo, BLOCK_N), SPLITS) * BLOCK_N
        lo = tl.minimum(lo + split * share, hi)
        hi = tl.minimum(lo + share, hi)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for start in range(lo, hi, BLOCK_N):
        t = start + tl.arange(0, BLOCK_N)
        seen = t < hi
        n = tl.zeros([BLOCK_N], tl.int64) + r
        if HAS_ANCESTRY:
            n = tl.load(ANCESTRY + r * stride_a + t, mask=seen, other=-1).to(tl.int64)
            seen = seen & (n >= 0)
        at = n * stride_kn + t.to(tl.int64) * stride_kt
        k = tile(K + head * stride_kh, at, 1, d, seen, D, EVEN)
        s = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
        s = product(s, q, tl.trans(k), CHUNK_D, PRECISION, ACCURATE)
        if HAS_CAP:
            s = outer * tanh(s * inner, ACCURATE)
        else:
            s = s * inner
        s = tl.where(seen[None, :], s, float("-inf"))
        higher = tl.maximum(largest, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        rescale = tl.exp2(largest - base)
        total = total * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        largest = higher
        at = n * stride_vn + t.to(tl.int64) * stride_vt
        v = tile(V + head * stride_vh, at, 1, d, seen, D, EVEN)
        acc = product(acc, p.to(v.dtype), v, CHUNK_N, PRECISION, ACCURATE)
    none = total == 0.0
    out = acc / tl.where(none, 1.0, total)[:, None]
    to = r * heads + q_head
    if SPLITS > 1:
        to += split.to(tl.int64) * rows * heads
        tl.store(STATS + 2 * to, largest, mask=real)
        tl.store(STATS + 2 * to + 1, total, mask=real)
    put_tile(OUT, to, D, d, real, out, D, EVEN)
