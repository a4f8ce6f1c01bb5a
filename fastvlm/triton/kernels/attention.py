"""Attention over packed rows, forward.

A program owns a block of the query rows that read one image, for one key/value head: rows of all
segments, beams and query heads of the group stand in one block (row m is reader m // GROUP, head
m % GROUP of the group), so that the keys and values of an image are loaded once for all of them.
Scores are kept in base 2.
"""

import triton
import triton.language as tl

from fastvlm.triton.kernels.math import product, tanh
from fastvlm.triton.kernels.random import kept


@triton.jit
def readers_of(ORDER, first, m, readers, GROUP: tl.constexpr, HAS_ORDER: tl.constexpr):
    """Rows m of an image: whether real, the reader's place and packed row, head in its group."""
    place = m // GROUP
    real = place < readers
    row = (first + place).to(tl.int64)
    if HAS_ORDER:
        row = tl.load(ORDER + row, mask=real, other=0)
    return real, place, row, m % GROUP


@triton.jit
def tile(POINTER, row, stride, d, real, D: tl.constexpr, EVEN: tl.constexpr):
    """[rows, BLOCK_D] of a tensor whose last dimension is dense; zeros where nothing stands."""
    at = POINTER + row[:, None] * stride + d[None, :]
    if EVEN:
        return tl.load(at, mask=real[:, None], other=0.0)
    return tl.load(at, mask=real[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def put_tile(POINTER, row, stride, d, real, value, D: tl.constexpr, EVEN: tl.constexpr):
    at = POINTER + row[:, None] * stride + d[None, :]
    value = value.to(POINTER.dtype.element_ty)
    if EVEN:
        tl.store(at, value, mask=real[:, None])
    else:
        tl.store(at, value, mask=real[:, None] & (d < D)[None, :])


@triton.jit
def visible(place, key, keys, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Which keys a row sees: those there are, none after it, none a window away. Broadcasts."""
    seen = key < keys
    if CAUSAL:
        seen = seen & (key <= place)
    if HAS_WINDOW:
        seen = seen & (place - key < window)
        if not CAUSAL:
            seen = seen & (key - place < window)
    return seen


@triton.jit
def _attend(
    acc, total, largest, q, K, V, key_start, lo, hi, keys, place, row_head, stride_kt, stride_vt,
    d, window, inner, outer, seed, threshold, factor,
    MASKED: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, ACCURATE: tl.constexpr, CHUNK_D: tl.constexpr,
    CHUNK_N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys lo to hi of an image against a block of rows, whose online softmax goes on."""
    for start in range(lo, hi, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        there = key < keys
        at = (key_start + key).to(tl.int64)
        k = tile(K, at, stride_kt, d, there, D, EVEN)
        s = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
        s = product(s, q, tl.trans(k), CHUNK_D, PRECISION, ACCURATE)
        if HAS_CAP:
            s = outer * tanh(s * inner, ACCURATE)
        else:
            s = s * inner
        if MASKED:
            seen = visible(place[:, None], key[None, :], keys, window, CAUSAL, HAS_WINDOW)
            s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(largest, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far
        p = tl.exp2(s - base[:, None])
        rescale = tl.exp2(largest - base)
        total = total * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        largest = higher
        if HAS_DROPOUT:
            counter = (row_head[:, None] << 32) + key[None, :]
            p = tl.where(kept(seed, counter, threshold), p * factor, 0.0)
        v = tile(V, at, stride_vt, d, there, D, EVEN)
        acc = product(acc, p.to(v.dtype), v, CHUNK_N, PRECISION, ACCURATE)
    return acc, total, largest


@triton.jit(do_not_specialize=["rows", "heads", "blocks", "window", "threshold"])
def attention_forward(
    Q, K, V, OUT, STATS, ORDER, READERS, KV_OFFSETS, SEED,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    rows, heads, blocks, window, inner, outer, threshold, factor,
    D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_ORDER: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr, ACCURATE: tl.constexpr, EVEN: tl.constexpr,
    CHUNK_D: tl.constexpr, CHUNK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """OUT [rows, H, D], STATS [rows, H, 2]; with SPLITS > 1 a part of each for each split, float32.

    STATS: the largest score, in base 2, and the sum of 2^(score - largest).

    Program 0: image * blocks + block of its rows. Program 1: key/value head * SPLITS + split.
    """
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    head, split = tl.program_id(1).to(tl.int64) // SPLITS, tl.program_id(1) % SPLITS
    first = tl.load(READERS + image)
    readers = tl.load(READERS + image + 1) - first
    if block * BLOCK_M >= readers * GROUP:
        return
    key_start = tl.load(KV_OFFSETS + image)
    keys = tl.load(KV_OFFSETS + image + 1) - key_start

    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real, place, row, g = readers_of(ORDER, first, m, readers, GROUP, HAS_ORDER)
    q_head = head * GROUP + g
    q = tile(Q + q_head[:, None] * stride_qh, row, stride_qt, d, real, D, EVEN)
    K += head * stride_kh
    V += head * stride_vh
    row_head = row * heads + q_head
    seed = tl.full([], 0, tl.int64)
    if HAS_DROPOUT:
        seed = tl.load(SEED)

    # the block's first and last place say which keys none of its rows sees
    earliest = (block * BLOCK_M) // GROUP
    latest = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, readers - 1)
    lo, hi = 0, keys
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(keys, BLOCK_N), SPLITS) * BLOCK_N
        lo = tl.minimum(split * share, keys)
        hi = tl.minimum(lo + share, keys)
    if CAUSAL:
        hi = tl.minimum(hi, latest + 1)
    if HAS_WINDOW:
        lo = tl.maximum(earliest - window + 1, 0) // BLOCK_N * BLOCK_N
        if not CAUSAL:
            hi = tl.minimum(hi, latest + window)
    # whole blocks that every row sees need no mask
    clear = lo + (hi - lo) // BLOCK_N * BLOCK_N
    if CAUSAL:
        clear = tl.minimum(clear, (earliest + 1) // BLOCK_N * BLOCK_N)
    if HAS_WINDOW:
        clear = lo

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, total, largest = _attend(
        acc, total, largest, q, K, V, key_start, lo, clear, keys, place, row_head,
        stride_kt, stride_vt, d, window, inner, outer, seed, threshold, factor,
        False, D, EVEN, CAUSAL, HAS_WINDOW, HAS_CAP, HAS_DROPOUT, PRECISION, ACCURATE,
        CHUNK_D, CHUNK_N, BLOCK_N,
    )  # fmt: skip
    acc, total, largest = _attend(
        acc, total, largest, q, K, V, key_start, clear, hi, keys, place, row_head,
        stride_kt, stride_vt, d, window, inner, outer, seed, threshold, factor,
        True, D, EVEN, CAUSAL, HAS_WINDOW, HAS_CAP, HAS_DROPOUT, PRECISION, ACCURATE,
        CHUNK_D, CHUNK_N, BLOCK_N,
    )  # fmt: skip

    none = total == 0.0
    out = acc / tl.where(none, 1.0, total)[:, None]
    if SPLITS > 1:
        row_head += split.to(tl.int64) * rows * heads
    put_tile(OUT, row_head, D, d, real, out, D, EVEN)
    tl.store(STATS + 2 * row_head, largest, mask=real)
    tl.store(STATS + 2 * row_head + 1, total, mask=real)


@triton.jit(do_not_specialize=["count"])
def attention_combine(
    PARTS, PARTS_STATS, OUT, STATS, count, D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """PARTS [SPLITS, count, D] of attention over parts of the keys -> OUT [count, D]."""
    item = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    at = s.to(tl.int64) * count + item
    part = tl.load(PARTS_STATS + 2 * at, mask=s < SPLITS, other=float("-inf"))
    largest = tl.max(part, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    sums = tl.load(PARTS_STATS + 2 * at + 1, mask=s < SPLITS, other=0.0)
    weight = sums * tl.exp2(part - base)
    total = tl.sum(weight, 0)
    there = (s < SPLITS)[:, None] & (d < D)[None, :]
    parts = tl.load(PARTS + at[:, None] * D + d[None, :], mask=there, other=0.0)
    out = tl.sum(parts * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(OUT + item * D + d, out.to(OUT.dtype.element_ty), mask=d < D)
    tl.store(STATS + 2 * item, largest)
    tl.store(STATS + 2 * item + 1, total)
