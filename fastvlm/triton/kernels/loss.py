"""The output head forward: tiles of logits that are reduced where they are computed.

A program computes the logits of BLOCK_M rows and BLOCK_N tokens and leaves, for each row, their
largest, the sum of exp(logit - largest), and what the op wants of them. A second kernel puts the
parts of all blocks together, in one order, whatever the schedule.
"""

import triton
import triton.language as tl

from fastvlm.triton.kernels.math import below_cap, exp, tanh

# a key's lower half is _LAST - index: of equal scores the one with the smaller index is larger
_LAST = tl.constexpr(0x7FFFFFFF)
# below the key of every score, that of -inf too
_NONE = tl.constexpr(-0x7FFFFFFFFFFFFFFF)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def order_rows(
    LABELS, GRAD, ORDER, COUNT, SCALE, NLL, LSE, rows, ignore_index,
    BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ORDER int32 [rows]: the rows that count, then the others; COUNT int32 [1] of the former.

    One program. Forward: NLL [rows] and LSE [rows, 2] of the others become 0. Backward: SCALE [1]
    becomes the unit in which gradients of logits are kept (see `loss_backward.py`).
    """
    count = tl.full([], 0, tl.int32)
    largest = tl.full([], 1e-30, tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < rows
        counts = inside & (tl.load(LABELS + row, mask=inside, other=0) != ignore_index)
        before = count + tl.cumsum(counts.to(tl.int32), 0)  # with the row itself
        place = tl.where(counts, before - 1, rows - 1 - (row - before))
        tl.store(ORDER + place, row, mask=inside)
        count += tl.sum(counts.to(tl.int32), 0)
        if BACKWARD:
            grad = tl.load(GRAD + row, mask=counts, other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(grad), 0))
        else:
            tl.store(NLL + row, 0.0, mask=inside & (counts == 0))
            tl.store(LSE + 2 * row, 0.0, mask=inside & (counts == 0))
            tl.store(LSE + 2 * row + 1, 0.0, mask=inside & (counts == 0))
    tl.store(COUNT, count)
    if BACKWARD:
        # a power of two, so that scaling costs no digit; finite, or one row would spoil all others
        largest = tl.minimum(largest, 1e30)
        tl.store(SCALE, tl.exp2(tl.floor(tl.log2(largest)) - 12.0))


@triton.jit
def tile_of(program, blocks_m, blocks_n, GROUP: tl.constexpr):
    """The tile of a program: down a band of GROUP row blocks first, then the next column block.

    Programs that run at the same time share the rows of a band and a few column blocks in the L2.
    """
    band = program // (GROUP * blocks_n)
    within = program % (GROUP * blocks_n)
    height = tl.minimum(blocks_m - band * GROUP, GROUP)
    return band * GROUP + within % height, within // height


@triton.jit
def product_tile(
    H, WEIGHT, row, column, stride_h, stride_w, d, vocabulary,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """H WEIGHT^T float32 [BLOCK_M, BLOCK_N]. row int64, all valid. EVEN: BLOCK_K divides d."""
    inner = tl.arange(0, BLOCK_K)
    # a token beyond the vocabulary reads the last one's weight: no mask in the loop
    real = tl.minimum(column, vocabulary - 1).to(tl.int64)
    at_h = H + row[:, None] * stride_h + inner[None, :]
    at_w = WEIGHT + real[None, :] * stride_w + inner[:, None]
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, d, BLOCK_K):
        if EVEN:
            h = tl.load(at_h)
            w = tl.load(at_w)
        else:
            h = tl.load(at_h, mask=(inner < d - k)[None, :], other=0.0)
            w = tl.load(at_w, mask=(inner < d - k)[:, None], other=0.0)
        product = tl.dot(h, w, product, input_precision=PRECISION)
        at_h += BLOCK_K
        at_w += BLOCK_K
    return product


@triton.jit
def logits_of(
    product, BIAS, column, vocabulary, cap,
    HAS_BIAS: tl.constexpr, CAP: tl.constexpr, ACCURATE: tl.constexpr,
):  # fmt: skip
    """With bias and cap; -inf beyond the vocabulary."""
    inside = column < vocabulary
    logits = product
    if HAS_BIAS:
        logits += tl.load(BIAS + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if CAP:
        if ACCURATE:
            logits = cap * tanh(logits / cap, True)
        else:
            logits = cap - 2.0 * cap * below_cap(logits, cap)
    return tl.where(inside[None, :], logits, float("-inf"))


@triton.jit
def _or_zero(largest):
    """What to subtract: nothing where all logits are -inf."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _put_part(LARGEST, SUMS, at, logits, mask):
    largest = tl.max(logits, 1)
    tl.store(LARGEST + at, largest, mask=mask)
    shares = exp(logits - _or_zero(largest)[:, None])
    tl.store(SUMS + at, tl.sum(shares, 1), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def cross_entropy_tiles(
    H, WEIGHT, BIAS, LABELS, ORDER, COUNT, LARGEST, SUMS, PICKED,
    stride_h, stride_w, rows, d, vocabulary, cap,
    HAS_BIAS: tl.constexpr, CAP: tl.constexpr, EVEN: tl.constexpr, ACCURATE: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LARGEST and SUMS [blocks, rows], PICKED [rows]: the label's logit. Rows in ORDER."""
    count = tl.load(COUNT)
    blocks_m = tl.cdiv(count, BLOCK_M)
    blocks_n = tl.cdiv(vocabulary, BLOCK_N)
    if tl.program_id(0) >= blocks_m * blocks_n:
        return
    block_m, block_n = tile_of(tl.program_id(0), blocks_m, blocks_n, GROUP)
    place = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(ORDER + tl.minimum(place, count - 1)).to(tl.int64)
    product = product_tile(
        H, WEIGHT, row, column, stride_h, stride_w, d, vocabulary,
        EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    logits = logits_of(product, BIAS, column, vocabulary, cap, HAS_BIAS, CAP, ACCURATE)
    _put_part(LARGEST, SUMS, block_n.to(tl.int64) * rows + place, logits, place < count)
    label = tl.load(LABELS + row).to(tl.int32)
    picked = tl.sum(tl.where(label[:, None] == column[None, :], logits, 0.0), 1)
    mine = label // BLOCK_N == block_n
    tl.store(PICKED + place, picked, mask=mine & (place < count))


@triton.jit(do_not_specialize=["rows", "vocabulary"])
def cross_entropy_combine(
    LARGEST, SUMS, PICKED, LABELS, ORDER, COUNT, NLL, LSE, rows, blocks, vocabulary,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """NLL [rows] and the two parts of logsumexp LSE [rows, 2], back in the order of the batch.

    A label outside of the vocabulary, whose PICKED is whatever there was, makes them NaN, and with
    them the gradients of its row.
    """
    count = tl.load(COUNT)
    if tl.program_id(0) * BLOCK_M >= count:
        return
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = place < count
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, blocks, BLOCK_N):
        block = start + tl.arange(0, BLOCK_N)
        at = block.to(tl.int64)[:, None] * rows + place[None, :]
        mask = (block < blocks)[:, None] & inside[None, :]
        theirs = tl.load(LARGEST + at, mask=mask, other=float("-inf"))
        sums = tl.load(SUMS + at, mask=mask, other=0.0)
        higher = tl.maximum(largest, tl.max(theirs, 0))
        base = _or_zero(higher)
        total = total * tl.exp(largest - base) + tl.sum(sums * tl.exp(theirs - base[None, :]), 0)
        largest = higher
    rest = tl.log(total)
    row = tl.load(ORDER + place, mask=inside, other=0)
    label = tl.load(LABELS + row, mask=inside, other=0)
    known = (label >= 0) & (label < vocabulary)
    largest = tl.where(known, largest, float("nan"))
    picked = tl.load(PICKED + place, mask=inside & known, other=0.0)
    tl.store(NLL + row, rest - (picked - largest), mask=inside)
    tl.store(LSE + 2 * row, largest, mask=inside)
    tl.store(LSE + 2 * row + 1, rest, mask=inside)


@triton.jit
def _key(score, column):
    """int64, in the order of the scores, then of falling index; no two are equal."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 is no less
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (_LAST - column).to(tl.int64)


@triton.jit
def _score_and_index(key):
    ordered = (key >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True), _LAST - (key & _LAST)


@triton.jit(do_not_specialize=["rows", "kept"])
def topk_tiles(
    H, WEIGHT, BIAS, LARGEST, SUMS, KEYS, stride_h, stride_w, rows, d, vocabulary, cap, kept,
    HAS_BIAS: tl.constexpr, CAP: tl.constexpr, EVEN: tl.constexpr, ACCURATE: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LARGEST and SUMS [rows, blocks], KEYS int64 [rows, blocks, kept]: the best, descending."""
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(vocabulary, BLOCK_N)
    block_m, block_n = tile_of(tl.program_id(0), blocks_m, blocks_n, GROUP)
    place = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(place, rows - 1).to(tl.int64)
    product = product_tile(
        H, WEIGHT, row, column, stride_h, stride_w, d, vocabulary,
        EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    logits = logits_of(product, BIAS, column, vocabulary, cap, HAS_BIAS, CAP, ACCURATE)
    at = row * blocks_n + block_n
    _put_part(LARGEST, SUMS, at, logits, place < rows)
    keys = tl.where((column < vocabulary)[None, :], _key(logits, column[None, :]), _NONE)
    for j in range(kept):
        best = tl.max(keys, 1)
        tl.store(KEYS + at * kept + j, best, mask=place < rows)
        keys = tl.where(keys == best[:, None], _NONE, keys)


@triton.jit(do_not_specialize=["kept", "k"])
def topk_merge(
    LARGEST, SUMS, KEYS, VALUES, INDICES, LSE, blocks, kept, k, BLOCK: tl.constexpr
):  # fmt: skip
    """The k best of a row: k times the largest of what the blocks have left. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    inside = block < blocks
    theirs = tl.load(LARGEST + row * blocks + block, mask=inside, other=float("-inf"))
    sums = tl.load(SUMS + row * blocks + block, mask=inside, other=0.0)
    largest = tl.max(theirs, 0)
    rest = tl.log(tl.sum(sums * tl.exp(theirs - _or_zero(largest)), 0))
    tl.store(LSE + row, largest + rest)
    at = KEYS + (row * blocks + block) * kept
    taken = tl.zeros([BLOCK], tl.int32)
    head = tl.load(at, mask=inside, other=_NONE)
    for j in range(k):
        best = tl.max(head, 0)
        score, index = _score_and_index(best)
        tl.store(VALUES + row * k + j, (score - largest) - rest)
        tl.store(INDICES + row * k + j, index)
        won = head == best
        taken += won.to(tl.int32)
        following = tl.load(at + taken, mask=won & inside & (taken < kept), other=_NONE)
        head = tl.where(won, following, head)
