"""Rotary position embedding of q and k in one launch, half-split form."""

import triton
import triton.language as tl


@triton.jit
def _turn(
    X, OUT, token, head, stride_t, stride_h, heads, cos1, cos2, sin1, sin2, half, inside,
    D: tl.constexpr, ROTARY: tl.constexpr, BACK: tl.constexpr, PASS: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
):  # fmt: skip
    """The heads of one token: [BLOCK_H, half] of each side, then what passes through."""
    at = X + token * stride_t + head[:, None] * stride_h
    to = OUT + (token * heads + head[:, None]) * D
    real = (head < heads)[:, None]
    mask = real & inside[None, :]
    first = tl.load(at + half[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + ROTARY // 2 + half[None, :], mask=mask, other=0.0).to(tl.float32)
    if BACK:
        turned1 = first * cos1[None, :] + second * sin2[None, :]
        turned2 = second * cos2[None, :] - first * sin1[None, :]
    else:
        turned1 = first * cos1[None, :] - second * sin1[None, :]
        turned2 = second * cos2[None, :] + first * sin2[None, :]
    kind = OUT.dtype.element_ty
    tl.store(to + half[None, :], turned1.to(kind), mask=mask)
    tl.store(to + ROTARY // 2 + half[None, :], turned2.to(kind), mask=mask)
    if PASS:
        rest = ROTARY + tl.arange(0, BLOCK_PASS)
        there = real & (rest < D)[None, :]
        tl.store(to + rest[None, :], tl.load(at + rest[None, :], mask=there, other=0.0), mask=there)


@triton.jit
def rope(
    Q, K, COS, SIN, OUT_Q, OUT_K,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_ct, stride_st, heads, kv_heads,
    BLOCKS_Q: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, BACK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_PASS: tl.constexpr,
):  # fmt: skip
    """One token, and one block of heads: the first BLOCKS_Q blocks are q's, the others k's."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    half = tl.arange(0, BLOCK_HALF)
    inside = half < ROTARY // 2
    cos = COS + token * stride_ct + half
    sin = SIN + token * stride_st + half
    cos1 = tl.load(cos, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + ROTARY // 2, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + ROTARY // 2, mask=inside, other=0.0).to(tl.float32)
    if block < BLOCKS_Q:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        _turn(
            Q, OUT_Q, token, head, stride_qt, stride_qh, heads, cos1, cos2, sin1, sin2,
            half, inside, D, ROTARY, BACK, D > ROTARY, BLOCK_PASS,
        )  # fmt: skip
    else:
        head = (block - BLOCKS_Q) * BLOCK_H + tl.arange(0, BLOCK_H)
        _turn(
            K, OUT_K, token, head, stride_kt, stride_kh, kv_heads, cos1, cos2, sin1, sin2,
            half, inside, D, ROTARY, BACK, D > ROTARY, BLOCK_PASS,
        )  # fmt: skip
