"""Rotary position embedding of q and k in one launch, half-split form."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "heads", "kv_heads", "blocks_q"])
def rope(
    Q, K, COS, SIN, OUT_Q, OUT_K,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_ct, stride_st, tokens, heads, kv_heads,
    blocks_q, D: tl.constexpr, ROTARY: tl.constexpr, BACK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_PASS: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens and BLOCK_H heads: the first blocks_q blocks of heads are q's, then k's.

    The angles of a token are loaded once for all heads of the block, in the layout of a head.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    half = tl.arange(0, BLOCK_HALF)
    block = tl.program_id(1)
    if block < blocks_q:
        X, OUT, stride_t, stride_h, count = Q, OUT_Q, stride_qt, stride_qh, heads
    else:
        X, OUT, stride_t, stride_h, count = K, OUT_K, stride_kt, stride_kh, kv_heads
        block -= blocks_q
    real = token < tokens
    mask = real[:, None] & (half < ROTARY // 2)[None, :]
    token = token.to(tl.int64)
    at = token[:, None] * stride_ct + half[None, :]
    cos1 = tl.load(COS + at, mask=mask, other=0.0).to(tl.float32)
    cos2 = tl.load(COS + at + ROTARY // 2, mask=mask, other=0.0).to(tl.float32)
    at = token[:, None] * stride_st + half[None, :]
    sin1 = tl.load(SIN + at, mask=mask, other=0.0).to(tl.float32)
    sin2 = tl.load(SIN + at + ROTARY // 2, mask=mask, other=0.0).to(tl.float32)
    kind = OUT_Q.dtype.element_ty
    for i in tl.static_range(BLOCK_H):
        head = block * BLOCK_H + i
        if head < count:
            row = X + token[:, None] * stride_t + head.to(tl.int64) * stride_h
            to = OUT + (token[:, None] * count + head) * D
            first = tl.load(row + half[None, :], mask=mask, other=0.0).to(tl.float32)
            second = tl.load(row + ROTARY // 2 + half[None, :], mask=mask, other=0.0).to(tl.float32)
            if BACK:
                turned1 = first * cos1 + second * sin2
                turned2 = second * cos2 - first * sin1
            else:
                turned1 = first * cos1 - second * sin1
                turned2 = second * cos2 + first * sin2
            tl.store(to + half[None, :], turned1.to(kind), mask=mask)
            tl.store(to + ROTARY // 2 + half[None, :], turned2.to(kind), mask=mask)
            if D > ROTARY:
                rest = ROTARY + tl.arange(0, BLOCK_PASS)
                there = real[:, None] & (rest < D)[None, :]
                passed = tl.load(row + rest[None, :], mask=there, other=0.0)
                tl.store(to + rest[None, :], passed, mask=there)
