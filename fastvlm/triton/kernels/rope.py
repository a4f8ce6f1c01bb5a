"""Rotary position embedding of q and k in one launch, half-split form."""

import triton
import triton.language as tl


@triton.jit
def _turn(
    X, OUT, COS, SIN, token, head, stride_t, stride_h, heads, half, inside,
    D: tl.constexpr, ROTARY: tl.constexpr, BACK: tl.constexpr, PASS: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
):  # fmt: skip
    """The heads of one token: [BLOCK_H, half] of each side, then what passes through.

    The angles are loaded for each head, in the layout of the head: 128 bits at a time from the
    first-level cache. Loaded once, they would be 16 bits a thread and a trip through shared memory.
    """
    at = X + token * stride_t + head[:, None] * stride_h
    to = OUT + (token * heads + head[:, None]) * D
    real = (head < heads)[:, None]
    mask = real & inside[None, :]
    angle = half[None, :] + tl.zeros_like(head)[:, None]
    cos1 = tl.load(COS + angle, mask=mask, other=0.0).to(tl.float32)
    cos2 = tl.load(COS + ROTARY // 2 + angle, mask=mask, other=0.0).to(tl.float32)
    sin1 = tl.load(SIN + angle, mask=mask, other=0.0).to(tl.float32)
    sin2 = tl.load(SIN + ROTARY // 2 + angle, mask=mask, other=0.0).to(tl.float32)
    first = tl.load(at + half[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + ROTARY // 2 + half[None, :], mask=mask, other=0.0).to(tl.float32)
    if BACK:
        turned1 = first * cos1 + second * sin2
        turned2 = second * cos2 - first * sin1
    else:
        turned1 = first * cos1 - second * sin1
        turned2 = second * cos2 + first * sin2
    kind = OUT.dtype.element_ty
    tl.store(to + half[None, :], turned1.to(kind), mask=mask)
    tl.store(to + ROTARY // 2 + half[None, :], turned2.to(kind), mask=mask)
    if PASS:
        rest = ROTARY + tl.arange(0, BLOCK_PASS)
        there = real & (rest < D)[None, :]
        tl.store(to + rest[None, :], tl.load(at + rest[None, :], mask=there, other=0.0), mask=there)


@triton.jit(do_not_specialize=["heads", "kv_heads"])
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
    cos = COS + token * stride_ct
    sin = SIN + token * stride_st
    if block < BLOCKS_Q:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        _turn(
            Q, OUT_Q, cos, sin, token, head, stride_qt, stride_qh, heads, half, inside,
            D, ROTARY, BACK, D > ROTARY, BLOCK_PASS,
        )  # fmt: skip
    else:
        head = (block - BLOCKS_Q) * BLOCK_H + tl.arange(0, BLOCK_H)
        _turn(
            K, OUT_K, cos, sin, token, head, stride_kt, stride_kh, kv_heads, half, inside,
            D, ROTARY, BACK, D > ROTARY, BLOCK_PASS,
        )  # fmt: skip
