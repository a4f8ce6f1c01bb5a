"""The output head backward, over one chunk of the vocabulary: its gradients of the logits exist.

Kernels get slices of weight and bias that hold the chunk, so "vocabulary" is the chunk's width
here. Rows are in the order of ORDER: those that count come first. DLOGITS goes on from there to
"padded", a multiple of every block size, so its readers load whole vectors, without a mask. What
stands there is finite where the last token's is, which it is of, less its bias: dh multiplies it by
0, and nobody else stores what comes of it.

Gradients of logits are kept in units of SCALE, a power of two that brings the largest gradient of
a loss to about 4096: in float16 a probability of 1e-6, over a mean of a thousand rows, would be 0.

SKIP: LIVE says which tiles of DLOGITS have more than tiny ones, and the sums of dh and dweight go
over those alone. They follow a list, because a condition in the loop would keep its loads from
running ahead of the products. What is tiny, and what leaving it out does, says the op.
"""

import triton
import triton.language as tl

from fastvlm.triton.kernels.loss import product_tile, tile_of
from fastvlm.triton.kernels.math import LOG2E, below_cap, exp, tanh


@triton.jit
def wide(x):
    """A scalar as int64, be it an argument that is compiled in, being 1."""
    return tl.full([], 0, tl.int64) + x


@triton.jit
def halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile: what is done with it takes half as many registers."""
    return tl.split(tl.permute(tl.reshape(x, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))


@triton.jit
def _put_dlogits(
    logits, BIAS, to, column, label, grad, largest, rest, counts, vocabulary, cap, skip_below,
    HAS_BIAS: tl.constexpr, CAP: tl.constexpr, ACCURATE: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """logits: without bias and cap. to: pointers to the rows. label, column: in the chunk.

    SKIP: gives 1 where any of them counts: a label's own, or one that is not tiny (or NaN).
    """
    if HAS_BIAS:
        bias = tl.load(BIAS + column, mask=column < vocabulary, other=float("-inf"))
        logits += bias.to(tl.float32)[None, :]
    own = label[:, None] == column[None, :]
    if CAP and not ACCURATE:
        s = below_cap(logits, cap)
        base = ((cap - largest) - rest) * LOG2E
        p = tl.exp2(base[:, None] - (2.0 * cap * LOG2E) * s)
        slope = s - s * s
        dlogits = tl.where(own, p - 1.0, p) * (slope * (4.0 * grad)[:, None])
    else:
        if CAP:
            logits = cap * tanh(logits / cap, True)
        p = exp((logits - largest[:, None]) - rest[:, None])
        dlogits = tl.where(own, p - 1.0, p) * grad[:, None]
        if CAP:
            # tanh once more from its product, which takes no second tile of registers
            t = logits / cap
            dlogits *= 1.0 - t * t
    tl.store(to[:, None] + column[None, :], dlogits.to(to.dtype.element_ty), mask=counts[:, None])
    live = 0
    if SKIP:
        tiny = tl.abs(dlogits) <= (skip_below * tl.abs(grad))[:, None]
        live = tl.max(tl.where(tiny & (own == 0), 0, 1))
    return live


@triton.jit(do_not_specialize=["start"])
def cross_entropy_dlogits(
    GRAD, X, WEIGHT, BIAS, LABELS, LSE, ORDER, COUNT, SCALE, DLOGITS, LIVE,
    stride_w, stride_d, d, start, vocabulary, padded, cap, skip_below,
    HAS_BIAS: tl.constexpr, CAP: tl.constexpr, EVEN: tl.constexpr, ACCURATE: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """DLOGITS [rows, stride_d] from X [rows, d], which is in order; start: the first token.

    SKIP: LIVE int32 [blocks of rows, blocks of tokens].
    """
    count = tl.load(COUNT)
    blocks_m = tl.cdiv(count, BLOCK_M)
    blocks_n = tl.cdiv(padded, BLOCK_N)
    if tl.program_id(0) >= blocks_m * blocks_n:
        return
    block_m, block_n = tile_of(tl.program_id(0), blocks_m, blocks_n, GROUP)
    place = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    real = tl.minimum(place, count - 1)
    product = product_tile(
        X, WEIGHT, real.to(tl.int64), column, d, stride_w, d, vocabulary,
        EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    row = tl.load(ORDER + real)
    largest, rest = tl.load(LSE + 2 * row), tl.load(LSE + 2 * row + 1)
    label = tl.load(LABELS + row).to(tl.int32) - start
    grad = tl.load(GRAD + row) / tl.load(SCALE)
    to = DLOGITS + place.to(tl.int64) * stride_d
    counts = place < count
    if BLOCK_N < 128:
        live = _put_dlogits(
            product, BIAS, to, column, label, grad, largest, rest, counts, vocabulary, cap,
            skip_below, HAS_BIAS, CAP, ACCURATE, SKIP,
        )  # fmt: skip
    else:
        left, right = halves(product, BLOCK_M, BLOCK_N)
        column = block_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        live = _put_dlogits(
            left, BIAS, to, column, label, grad, largest, rest, counts, vocabulary, cap,
            skip_below, HAS_BIAS, CAP, ACCURATE, SKIP,
        )  # fmt: skip
        live |= _put_dlogits(
            right, BIAS, to, column + BLOCK_N // 2, label, grad, largest, rest, counts,
            vocabulary, cap, skip_below, HAS_BIAS, CAP, ACCURATE, SKIP,
        )  # fmt: skip
    if SKIP:
        tl.store(LIVE + block_m * blocks_n + block_n, live)


@triton.jit(do_not_specialize=["width", "padded"])
def live_steps(
    LIVE, STEPS, LENGTHS, COUNT, width, padded,
    OF_ROWS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Over which steps of a sum a program goes: STEPS int32 [blocks, steps], LENGTHS [blocks].

    OF_ROWS: blocks of BLOCK rows, whose sums go over tokens, STEP at a time (dh); else blocks of
    BLOCK tokens, whose sums go over rows. A step counts where a tile of LIVE that it touches does.
    """
    across = tl.cdiv(padded, TILE_N)
    if OF_ROWS:
        end, inner_end = tl.load(COUNT), width
        stride, inner_stride = across, 1
        tile, inner_tile = TILE_M, TILE_N
    else:
        end, inner_end = width, tl.load(COUNT)
        stride, inner_stride = 1, across
        tile, inner_tile = TILE_N, TILE_M
    block = tl.program_id(0)
    steps = tl.cdiv(inner_end, STEP)
    length = tl.full([], 0, tl.int32)
    for start in range(0, steps, TOGETHER):
        step = start + tl.arange(0, TOGETHER)
        live = tl.zeros([TOGETHER], tl.int32)
        for first in range(
            block * BLOCK // tile * tile, tl.minimum(block * BLOCK + BLOCK, end), tile
        ):
            for more in range(0, STEP, inner_tile):
                inner = step * STEP + more
                at = first // tile * stride + inner // inner_tile * inner_stride
                live |= tl.load(LIVE + at, mask=inner < inner_end, other=0)
        tl.store(STEPS + block * steps + length + tl.cumsum(live, 0) - 1, step, mask=live != 0)
        length += tl.sum(live, 0)
    tl.store(LENGTHS + block, length)


@triton.jit
def _add_to_dh(
    total, SUMS, DH, row, place, column, count, rows, d, scale, first, last
):  # fmt: skip
    """A tile of the chunk's products, row int64: to the sums so far, or with them to dh."""
    at = row[:, None] * d + column[None, :]
    counts = (place < count)[:, None] & (column < d)[None, :]
    total += tl.load(SUMS + at, mask=counts & (first == 0), other=0.0)
    if last == 0:
        tl.store(SUMS + at, total, mask=counts)
    else:
        mask = (place < rows)[:, None] & (column < d)[None, :]
        total = tl.where(counts, total * scale, 0.0)
        tl.store(DH + at, total.to(DH.dtype.element_ty), mask=mask)


@triton.jit
def _dh_step(total, at_d, at_w, token, feature, EVEN: tl.constexpr, PRECISION: tl.constexpr):
    """total + a step's product; token and feature: which are there."""
    dlogits = tl.load(at_d)
    if EVEN:
        w = tl.load(at_w)
    else:
        w = tl.load(at_w, mask=token[:, None] & feature[None, :], other=0.0)
    return tl.dot(dlogits, w, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["rows", "first", "last"])
def cross_entropy_dh(
    DLOGITS, WEIGHT, SUMS, DH, ORDER, COUNT, SCALE, STEPS, LENGTHS,
    stride_d, stride_w, rows, d, vocabulary, first, last,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    ACCURATE: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """SUMS float32 [rows, d] += DLOGITS WEIGHT, of the first chunk =; the last one writes DH.

    DH of the rows that do not count is 0. A block of such rows has no product to compute. SKIP: the
    sums go over STEPS and LENGTHS (`live_steps`). ACCURATE: TOGETHER steps are summed apart; a
    product in float32 is one chain of additions, and over a whole vocabulary it loses a digit.
    """
    TOGETHER: tl.constexpr = 16
    count = tl.load(COUNT)
    block_m, block_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(d, BLOCK_N), GROUP)
    idle = block_m * BLOCK_M >= count
    if SKIP:
        steps = tl.load(LENGTHS + block_m)
        idle |= (steps == 0) & (first == 0)
    if idle & (last == 0):
        return
    place = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    real = tl.maximum(tl.minimum(place, count - 1), 0).to(tl.int64)
    at_d = DLOGITS + real[:, None] * stride_d + inner[None, :]
    at_w = WEIGHT + inner.to(tl.int64)[:, None] * stride_w + column[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if SKIP:
        STEPS += block_m * tl.cdiv(vocabulary, BLOCK_K)
    if ACCURATE:
        if not SKIP:
            steps = tl.where(block_m * BLOCK_M < count, tl.cdiv(vocabulary, BLOCK_K), 0)
        for start in range(0, steps, TOGETHER):
            part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for i in range(start, tl.minimum(start + TOGETHER, steps)):
                k = i * BLOCK_K
                if SKIP:
                    k = tl.load(STEPS + i) * BLOCK_K
                part = _dh_step(
                    part, at_d + k, at_w + wide(k) * stride_w, inner < vocabulary - k, column < d,
                    EVEN_N and EVEN_K, PRECISION,
                )  # fmt: skip
            total += part
    elif SKIP:
        step = tl.load(STEPS, mask=steps > 0, other=0)
        for i in range(1, steps + 1):
            k = step * BLOCK_K
            # ahead of the loads that need it; the last one comes twice, and is not used then
            step = tl.load(STEPS + tl.minimum(i, steps - 1))
            total = _dh_step(
                total, at_d + k, at_w + wide(k) * stride_w, inner < vocabulary - k, column < d,
                EVEN_N and EVEN_K, PRECISION,
            )  # fmt: skip
    else:
        for k in range(0, tl.where(block_m * BLOCK_M < count, vocabulary, 0), BLOCK_K):
            total = _dh_step(
                total, at_d, at_w, inner < vocabulary - k, column < d, EVEN_N and EVEN_K, PRECISION
            )
            at_d += BLOCK_K
            at_w += BLOCK_K * wide(stride_w)
    row = tl.load(ORDER + tl.minimum(place, rows - 1)).to(tl.int64)
    scale = tl.load(SCALE)
    if BLOCK_N < 128:
        _add_to_dh(total, SUMS, DH, row, place, column, count, rows, d, scale, first, last)
    else:
        left, right = halves(total, BLOCK_M, BLOCK_N)
        column = block_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        _add_to_dh(left, SUMS, DH, row, place, column, count, rows, d, scale, first, last)
        column += BLOCK_N // 2
        _add_to_dh(right, SUMS, DH, row, place, column, count, rows, d, scale, first, last)


@triton.jit
def cross_entropy_dweight(
    DLOGITS, X, DWEIGHT, COUNT, SCALE, STEPS, LENGTHS, stride_d, d, vocabulary,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """DWEIGHT [vocabulary, d] = DLOGITS^T X over the rows that count. SKIP: as in dh."""
    count = tl.load(COUNT)
    block_m, block_n = tile_of(
        tl.program_id(0), tl.cdiv(vocabulary, BLOCK_M), tl.cdiv(d, BLOCK_N), GROUP
    )
    token = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    at_d = DLOGITS + inner.to(tl.int64)[None, :] * stride_d + token[:, None]
    at_x = X + inner.to(tl.int64)[:, None] * d + column[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # two loops of the same three lines: what they share is compiled worse as a function
    if SKIP:
        STEPS += block_m * tl.cdiv(count, BLOCK_K)
        steps = tl.load(LENGTHS + block_m)
        step = tl.load(STEPS, mask=steps > 0, other=0)
        for i in range(1, steps + 1):
            k = step * BLOCK_K
            # ahead of the loads that need it; the last one comes twice, and is not used then
            step = tl.load(STEPS + tl.minimum(i, steps - 1))
            inside = inner < count - k
            of_x = inside[:, None]
            if not EVEN_N:
                of_x = of_x & (column < d)[None, :]
            dlogits = tl.load(at_d + wide(k) * stride_d, mask=inside[None, :], other=0.0)
            x = tl.load(at_x + wide(k) * d, mask=of_x, other=0.0)
            total = tl.dot(dlogits, x, total, input_precision=PRECISION)
    else:
        for k in range(0, count, BLOCK_K):
            inside = inner < count - k
            of_x = inside[:, None]
            if not EVEN_N:
                of_x = of_x & (column < d)[None, :]
            dlogits = tl.load(at_d, mask=inside[None, :], other=0.0)
            x = tl.load(at_x, mask=of_x, other=0.0)
            total = tl.dot(dlogits, x, total, input_precision=PRECISION)
            at_d += BLOCK_K * wide(stride_d)
            at_x += BLOCK_K * wide(d)
    total *= tl.load(SCALE)
    tl.store(
        DWEIGHT + token.to(tl.int64)[:, None] * d + column[None, :],
        total.to(DWEIGHT.dtype.element_ty),
        mask=(token < vocabulary)[:, None] & (column < d)[None, :],
    )


@triton.jit
def cross_entropy_dbias(
    DLOGITS, DBIAS, COUNT, SCALE, stride_d, vocabulary,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """DBIAS [vocabulary]: the sums of DLOGITS over the rows that count, in their order."""
    count = tl.load(COUNT)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_M):
        place = start + inner
        total += tl.load(
            DLOGITS + place.to(tl.int64)[:, None] * stride_d + token[None, :],
            # not "vocabulary", which is odd often: whole vectors, of which the rest is not stored
            mask=(place < count)[:, None] & (token < stride_d)[None, :],
            other=0.0,
        ).to(tl.float32)
    total_of_token = tl.sum(total, 0) * tl.load(SCALE)
    tl.store(DBIAS + token, total_of_token.to(DBIAS.dtype.element_ty), mask=token < vocabulary)
