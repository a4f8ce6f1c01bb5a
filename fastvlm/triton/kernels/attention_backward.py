"""Attention over packed rows, backward: scores are recomputed, nothing is added atomically.

One kernel owns blocks of query rows and makes dQ (and delta, the sum over D of out * grad), another
owns blocks of keys and walks over all readers of the image, so that dK and dV are sums in one
order.
"""

import triton
import triton.language as tl

from fastvlm.triton.kernels.attention import put_tile, readers_of, tile, visible
from fastvlm.triton.kernels.math import product, tanh
from fastvlm.triton.kernels.random import kept


@triton.jit
def _stats(STATS, row_head, real):
    """The largest score and 1 / sum of a row; (0, 0) for one that saw nothing or is not there."""
    largest = tl.load(STATS + 2 * row_head, mask=real, other=0.0)
    total = tl.load(STATS + 2 * row_head + 1, mask=real, other=0.0)
    none = total == 0.0
    return tl.where(none, 0.0, largest), tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, total))


@triton.jit
def _score_gradient(
    s, dp, largest, part, delta, seen, dropped, inner, outer, factor,
    MASKED: tl.constexpr, HAS_CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    ACCURATE: tl.constexpr,
):  # fmt: skip
    """From products q.k and grad.v: the probabilities as they met v, and the gradient of q.k
    without the scale. largest, part (1 / sum) and delta are of the rows, broadcast over keys."""
    if HAS_CAP:
        t = tanh(s * inner, ACCURATE)
        p = tl.exp2(outer * t - largest) * part
    else:
        p = tl.exp2(s * inner - largest) * part
    if MASKED:
        p = tl.where(seen, p, 0.0)
    met = p
    if HAS_DROPOUT:
        met = tl.where(dropped, 0.0, p * factor)
        dp = tl.where(dropped, 0.0, dp * factor)
    # dp and delta are sums in different orders: for a row that sees one key their difference, 0, is
    # all rounding
    ds = tl.where(p >= 1.0, 0.0, p * (dp - delta))
    if HAS_CAP:
        ds = ds * (1.0 - t * t)
    return met, ds


@triton.jit(do_not_specialize=["heads", "blocks", "window", "threshold"])
def attention_backward_q(
    GRAD, Q, K, V, OUT, STATS, DELTA, DQ, ORDER, READERS, KV_OFFSETS, SEED,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    heads, blocks, window, scale, inner, outer, threshold, factor,
    D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_ORDER: tl.constexpr,
    NEED_Q: tl.constexpr, PRECISION: tl.constexpr, ACCURATE: tl.constexpr, EVEN: tl.constexpr,
    CHUNK_D: tl.constexpr, CHUNK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """DELTA [rows, H] and, with NEED_Q, DQ [rows, H, D]. OUT is dense."""
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    head = tl.program_id(1).to(tl.int64)
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
    row_head = row * heads + q_head
    grad = tile(GRAD + q_head[:, None] * stride_gh, row, stride_gt, d, real, D, EVEN)
    out = tile(OUT, row_head, D, d, real, D, EVEN)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + row_head, delta, mask=real)
    if NEED_Q:
        q = tile(Q + q_head[:, None] * stride_qh, row, stride_qt, d, real, D, EVEN)
        largest, part = _stats(STATS, row_head, real)
        K += head * stride_kh
        V += head * stride_vh
        seed = tl.full([], 0, tl.int64)
        if HAS_DROPOUT:
            seed = tl.load(SEED)
        earliest = (block * BLOCK_M) // GROUP
        latest = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, readers - 1)
        lo, hi = 0, keys
        if CAUSAL:
            hi = tl.minimum(hi, latest + 1)
        if HAS_WINDOW:
            lo = tl.maximum(earliest - window + 1, 0) // BLOCK_N * BLOCK_N
            if not CAUSAL:
                hi = tl.minimum(hi, latest + window)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(lo, hi, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            there = key < keys
            at = (key_start + key).to(tl.int64)
            k = tile(K, at, stride_kt, d, there, D, EVEN)
            v = tile(V, at, stride_vt, d, there, D, EVEN)
            zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            s = product(zeros, q, tl.trans(k), CHUNK_D, PRECISION, ACCURATE)
            dp = product(zeros, grad, tl.trans(v), CHUNK_D, PRECISION, ACCURATE)
            seen = visible(place[:, None], key[None, :], keys, window, CAUSAL, HAS_WINDOW)
            dropped = seen
            if HAS_DROPOUT:
                counter = (row_head[:, None] << 32) + key[None, :]
                dropped = kept(seed, counter, threshold) == 0
            _, ds = _score_gradient(
                s, dp, largest[:, None], part[:, None], delta[:, None], seen, dropped,
                inner, outer, factor, True, HAS_CAP, HAS_DROPOUT, ACCURATE,
            )  # fmt: skip
            dq = product(dq, ds.to(k.dtype), k, CHUNK_N, PRECISION, ACCURATE)
        put_tile(DQ, row_head, D, d, real, dq * scale, D, EVEN)


@triton.jit(do_not_specialize=["heads", "kv_heads", "blocks", "window", "threshold"])
def attention_backward_kv(
    GRAD, Q, K, V, STATS, DELTA, DK, DV, ORDER, READERS, KV_OFFSETS, SEED,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    heads, kv_heads, blocks, window, scale, inner, outer, threshold, factor,
    D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_ORDER: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, PRECISION: tl.constexpr, ACCURATE: tl.constexpr,
    EVEN: tl.constexpr, CHUNK_D: tl.constexpr, CHUNK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """DK, DV [keys, Hkv, D], those that are needed; scores stand transposed, [keys, rows]."""
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    head = tl.program_id(1).to(tl.int64)
    key_start = tl.load(KV_OFFSETS + image)
    keys = tl.load(KV_OFFSETS + image + 1) - key_start
    if block * BLOCK_N >= keys:
        return
    first = tl.load(READERS + image)
    readers = tl.load(READERS + image + 1) - first

    d = tl.arange(0, BLOCK_D)
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    there = key < keys
    at = (key_start + key).to(tl.int64)
    k = tile(K + head * stride_kh, at, stride_kt, d, there, D, EVEN)
    v = tile(V + head * stride_vh, at, stride_vt, d, there, D, EVEN)
    seed = tl.full([], 0, tl.int64)
    if HAS_DROPOUT:
        seed = tl.load(SEED)
    # the places that see any of these keys
    lo, hi = 0, readers
    if CAUSAL:
        lo = tl.minimum(block * BLOCK_N, readers)
    if HAS_WINDOW:
        hi = tl.minimum(hi, block * BLOCK_N + BLOCK_N - 1 + window)
        if not CAUSAL:
            lo = tl.minimum(tl.maximum(block * BLOCK_N - window + 1, 0), readers)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(lo * GROUP, hi * GROUP, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        real, place, row, g = readers_of(ORDER, first, m, readers, GROUP, HAS_ORDER)
        q_head = head * GROUP + g
        row_head = row * heads + q_head
        q = tile(Q + q_head[:, None] * stride_qh, row, stride_qt, d, real, D, EVEN)
        grad = tile(GRAD + q_head[:, None] * stride_gh, row, stride_gt, d, real, D, EVEN)
        largest, part = _stats(STATS, row_head, real)
        delta = tl.load(DELTA + row_head, mask=real, other=0.0)
        zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        s = product(zeros, k, tl.trans(q), CHUNK_D, PRECISION, ACCURATE)
        dp = product(zeros, v, tl.trans(grad), CHUNK_D, PRECISION, ACCURATE)
        # rows that are not there have neither q nor gradient: only causal and window hide
        MASKED: tl.constexpr = CAUSAL or HAS_WINDOW
        seen = visible(place[None, :], key[:, None], keys, window, CAUSAL, HAS_WINDOW)
        dropped = seen
        if HAS_DROPOUT:
            counter = (row_head[None, :] << 32) + key[:, None]
            dropped = kept(seed, counter, threshold) == 0
        met, ds = _score_gradient(
            s, dp, largest[None, :], part[None, :], delta[None, :], seen, dropped,
            inner, outer, factor, MASKED, HAS_CAP, HAS_DROPOUT, ACCURATE,
        )  # fmt: skip
        if NEED_V:
            dv = product(dv, met.to(grad.dtype), grad, CHUNK_N, PRECISION, ACCURATE)
        if NEED_K:
            dk = product(dk, ds.to(q.dtype), q, CHUNK_N, PRECISION, ACCURATE)
    to = at * kv_heads + head
    if NEED_K:
        put_tile(DK, to, D, d, there, dk * scale, D, EVEN)
    if NEED_V:
        put_tile(DV, to, D, d, there, dv, D, EVEN)
