"""Products with the activation of an MLP in their epilogue, and the product of a stored weight.

A program computes one [BLOCK_M, BLOCK_N] tile in float32. Rows and columns beyond the last are
computed for others over again (their indices wrap around) and left out when the tile is stored, so
that the loop over K has no mask but that of a ragged last step. An epilogue takes the tile in
SLICES of its columns: all of it at once would not fit into registers.
"""

import triton
import triton.language as tl

from fastvlm.triton.kernels.activation import gelu, gelu_and_slope
from fastvlm.triton.kernels.random import kept


@triton.jit
def _tiles(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)


@triton.jit
def _tile(tile, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The row block and column block of a tile.

    Neighbours in time are GROUP row blocks by all columns: what they read stays in the L2 cache.
    """
    across = GROUP * tl.cdiv(n, BLOCK_N)
    first = tile // across * GROUP
    rows = tl.minimum(tl.cdiv(m, BLOCK_M) - first, GROUP)
    return first + tile % across % rows, tile % across // rows


@triton.jit
def _wrapped(block, n, BLOCK: tl.constexpr):
    """Indices of a block, those beyond the last from 0 on."""
    return ((block * BLOCK + tl.arange(0, BLOCK)) % n).to(tl.int64)


@triton.jit
def _step(AT, left, AXIS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """The next BLOCK_K along the AXIS of K; zeros where fewer are left."""
    if EVEN_K:
        return tl.load(AT)
    else:
        inside = tl.expand_dims(tl.arange(0, BLOCK_K) < left, 1 - AXIS)
        return tl.load(AT, mask=inside, other=0.0)


@triton.jit
def _product(
    AT_A, AT_B, k, step_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a [BLOCK_M, K] b [K, BLOCK_N]; AT_A and AT_B point to their first BLOCK_K along K."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, k, BLOCK_K):
        a = _step(AT_A, k - done, 1, BLOCK_K, EVEN_K)
        b = _step(AT_B, k - done, 0, BLOCK_K, EVEN_K)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        AT_A += BLOCK_K
        AT_B += step_b
    return total


@triton.jit
def _product_down(
    GRAD, W, block_m, block_n, stride_g, stride_w, m, f, n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of grad [M, N] w [N, F]."""
    along = tl.arange(0, BLOCK_K)
    return _product(
        GRAD + _wrapped(block_m, m, BLOCK_M)[:, None] * stride_g + along[None, :],
        W + along.to(tl.int64)[:, None] * stride_w + _wrapped(block_n, f, BLOCK_N)[None, :],
        n, tl.full([], BLOCK_K, tl.int64) * stride_w,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip


@triton.jit
def _slices(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr):
    """x cut into SLICES of its columns, from left to right."""
    if SLICES == 1:
        return (x,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        return _slices(left, BLOCK_M, BLOCK_N // 2, SLICES // 2) + _slices(
            right, BLOCK_M, BLOCK_N // 2, SLICES // 2
        )


@triton.jit
def _place(
    block_m, block_n, SLICE: tl.constexpr, m, f,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Of one slice of a tile of a contiguous [M, F]: its columns, its offsets, which are inside."""
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + SLICE * WIDTH + tl.arange(0, WIDTH)
    at = row.to(tl.int64)[:, None] * f + column[None, :]
    return column, at, (row < m)[:, None] & (column < f)[None, :]


@triton.jit
def _geglu_forward_tile(
    tile, X, W_GATE, W_UP, HIDDEN, GATE, UP, stride_x, stride_g, stride_u, m, f, k,
    TANH: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    block_m, block_n = _tile(tile, m, f, BLOCK_M, BLOCK_N, GROUP)
    from_column = _wrapped(block_n, f, BLOCK_N)[None, :]
    along = tl.arange(0, BLOCK_K)
    at_x = X + _wrapped(block_m, m, BLOCK_M)[:, None] * stride_x + along[None, :]
    at_gate = W_GATE + from_column * stride_g + along[:, None]
    at_up = W_UP + from_column * stride_u + along[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, k, BLOCK_K):
        x = _step(at_x, k - done, 1, BLOCK_K, EVEN_K)
        w_gate = _step(at_gate, k - done, 0, BLOCK_K, EVEN_K)
        w_up = _step(at_up, k - done, 0, BLOCK_K, EVEN_K)
        gate = tl.dot(x, w_gate, gate, input_precision=PRECISION)
        up = tl.dot(x, w_up, up, input_precision=PRECISION)
        at_x += BLOCK_K
        at_gate += BLOCK_K
        at_up += BLOCK_K
    gates = _slices(gate, BLOCK_M, BLOCK_N, SLICES)
    ups = _slices(up, BLOCK_M, BLOCK_N, SLICES)
    kind = HIDDEN.dtype.element_ty
    for i in tl.static_range(SLICES):
        _, to, mask = _place(block_m, block_n, i, m, f, BLOCK_M, BLOCK_N, SLICES)
        if KEEP:
            tl.store(GATE + to, gates[i].to(kind), mask=mask)
            tl.store(UP + to, ups[i].to(kind), mask=mask)
        tl.store(HIDDEN + to, (gelu(gates[i], TANH) * ups[i]).to(kind), mask=mask)


@triton.jit(do_not_specialize=["m"])
def geglu_forward(
    X, W_GATE, W_UP, HIDDEN, GATE, UP, stride_x, stride_g, stride_u, m, f, k,
    TANH: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SLICES: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """hidden = gelu(x w_gate^T) * x w_up^T [M, F] by one reading of x; KEEP stores both factors."""
    if PERSISTENT:
        for tile in range(tl.program_id(0), _tiles(m, f, BLOCK_M, BLOCK_N), tl.num_programs(0)):
            _geglu_forward_tile(
                tile, X, W_GATE, W_UP, HIDDEN, GATE, UP, stride_x, stride_g, stride_u, m, f, k,
                TANH, KEEP, PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, SLICES,
            )  # fmt: skip
    else:
        _geglu_forward_tile(
            tl.program_id(0), X, W_GATE, W_UP, HIDDEN, GATE, UP, stride_x, stride_g, stride_u,
            m, f, k, TANH, KEEP, PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, SLICES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def geglu_backward(
    GRAD, W_DOWN, GATE, UP, DGATE, DUP, HIDDEN, stride_g, stride_w, m, f, n,
    TANH: tl.constexpr, NEED_GATE: tl.constexpr, NEED_UP: tl.constexpr,
    NEED_HIDDEN: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """dhidden = grad w_down [M, F] goes on as dgate and dup; hidden again for dw_down.

    grad [M, N], w_down [N, F]; what is [M, F] is contiguous.
    """
    block_m, block_n = _tile(tl.program_id(0), m, f, BLOCK_M, BLOCK_N, GROUP)
    dhidden = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if NEED_GATE or NEED_UP:
        dhidden = _product_down(
            GRAD, W_DOWN, block_m, block_n, stride_g, stride_w, m, f, n,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
    dhiddens = _slices(dhidden, BLOCK_M, BLOCK_N, SLICES)
    kind = GRAD.dtype.element_ty
    for i in tl.static_range(SLICES):
        _, at, mask = _place(block_m, block_n, i, m, f, BLOCK_M, BLOCK_N, SLICES)
        gate = tl.load(GATE + at, mask=mask, other=0.0).to(tl.float32)
        act, slope = gelu_and_slope(gate, TANH)
        if NEED_UP:
            tl.store(DUP + at, (dhiddens[i] * act).to(kind), mask=mask)
        if NEED_GATE or NEED_HIDDEN:
            up = tl.load(UP + at, mask=mask, other=0.0).to(tl.float32)
            if NEED_GATE:
                tl.store(DGATE + at, (dhiddens[i] * up * slope).to(kind), mask=mask)
            if NEED_HIDDEN:
                tl.store(HIDDEN + at, (act * up).to(kind), mask=mask)


@triton.jit
def _dropout(SEED, at, threshold, factor):
    """The factor of each element of the activation; at is row * columns + column."""
    return tl.where(kept(tl.load(SEED), at, threshold), factor, 0.0)


@triton.jit
def _gelu_forward_tile(
    tile, X, W, BIAS, SEED, HIDDEN, PRE, stride_x, stride_w, m, f, k, threshold, factor,
    TANH: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    block_m, block_n = _tile(tile, m, f, BLOCK_M, BLOCK_N, GROUP)
    along = tl.arange(0, BLOCK_K)
    product = _product(
        X + _wrapped(block_m, m, BLOCK_M)[:, None] * stride_x + along[None, :],
        W + _wrapped(block_n, f, BLOCK_N)[None, :] * stride_w + along[:, None],
        k, BLOCK_K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    products = _slices(product, BLOCK_M, BLOCK_N, SLICES)
    kind = HIDDEN.dtype.element_ty
    for i in tl.static_range(SLICES):
        column, to, mask = _place(block_m, block_n, i, m, f, BLOCK_M, BLOCK_N, SLICES)
        pre = products[i]
        if HAS_BIAS:
            pre += tl.load(BIAS + column, mask=column < f, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            tl.store(PRE + to, pre.to(kind), mask=mask)
        hidden = gelu(pre, TANH)
        if DROPOUT:
            hidden *= _dropout(SEED, to, threshold, factor)
        tl.store(HIDDEN + to, hidden.to(kind), mask=mask)


@triton.jit(do_not_specialize=["m", "threshold"])
def gelu_forward(
    X, W, BIAS, SEED, HIDDEN, PRE, stride_x, stride_w, m, f, k, threshold, factor,
    TANH: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SLICES: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """hidden = dropout(gelu(x w^T + bias)) [M, F]; KEEP stores what the activation is taken of."""
    if PERSISTENT:
        for tile in range(tl.program_id(0), _tiles(m, f, BLOCK_M, BLOCK_N), tl.num_programs(0)):
            _gelu_forward_tile(
                tile, X, W, BIAS, SEED, HIDDEN, PRE, stride_x, stride_w, m, f, k, threshold, factor,
                TANH, HAS_BIAS, DROPOUT, KEEP, PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
                SLICES,
            )  # fmt: skip
    else:
        _gelu_forward_tile(
            tl.program_id(0), X, W, BIAS, SEED, HIDDEN, PRE, stride_x, stride_w, m, f, k,
            threshold, factor, TANH, HAS_BIAS, DROPOUT, KEEP, PRECISION, EVEN_K, BLOCK_M, BLOCK_N,
            BLOCK_K, GROUP, SLICES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["m", "threshold"])
def gelu_backward(
    GRAD, W, PRE, SEED, DPRE, HIDDEN, DBIAS, stride_g, stride_w, m, f, n, threshold, factor,
    TANH: tl.constexpr, DROPOUT: tl.constexpr, NEED_PRE: tl.constexpr, NEED_HIDDEN: tl.constexpr,
    NEED_BIAS: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """dhidden = grad w [M, F] goes on as dpre; hidden again for dw2, as geglu_backward.

    DBIAS float32 [row blocks, F] takes the sums over each block of rows, to be added in order.
    """
    block_m, block_n = _tile(tl.program_id(0), m, f, BLOCK_M, BLOCK_N, GROUP)
    dhidden = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if NEED_PRE or NEED_BIAS:
        dhidden = _product_down(
            GRAD, W, block_m, block_n, stride_g, stride_w, m, f, n,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
    dhiddens = _slices(dhidden, BLOCK_M, BLOCK_N, SLICES)
    kind = GRAD.dtype.element_ty
    for i in tl.static_range(SLICES):
        column, at, mask = _place(block_m, block_n, i, m, f, BLOCK_M, BLOCK_N, SLICES)
        pre = tl.load(PRE + at, mask=mask, other=0.0).to(tl.float32)
        act, slope = gelu_and_slope(pre, TANH)
        if DROPOUT:
            scale = _dropout(SEED, at, threshold, factor)
            act *= scale
            slope *= scale
        if NEED_HIDDEN:
            tl.store(HIDDEN + at, act.to(kind), mask=mask)
        dpre = dhiddens[i] * slope
        if NEED_PRE:
            tl.store(DPRE + at, dpre.to(kind), mask=mask)
        if NEED_BIAS:
            sums = tl.sum(tl.where(mask, dpre, 0.0), 0)
            tl.store(DBIAS + block_m.to(tl.int64) * f + column, sums, mask=column < f)


@triton.jit
def _upper_half(x):
    """float32 without its lower 16 bits: exact in bfloat16, and x less it is exact too."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["m"])
def low_precision_linear(
    X, W, SCALE, BIAS, OUT, stride_x, stride_w, m, n, k,
    TERMS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """x w^T * scale + bias [M, N] for a bfloat16 or int8 weight [N, K].

    The weight is the left factor, which is widened in the registers that the product takes it
    from. It is exact in 16 bits, and x is the sum of TERMS of 16 bits: the products lose nothing
    and run on tensor cores even where x is float32.
    """
    block_m, block_n = _tile(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    along = tl.arange(0, BLOCK_K)
    at_x = X + _wrapped(block_m, m, BLOCK_M)[None, :] * stride_x + along[:, None]
    at_w = W + _wrapped(block_n, n, BLOCK_N)[:, None] * stride_w + along[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for done in range(0, k, BLOCK_K):
        x = _step(at_x, k - done, 0, BLOCK_K, EVEN_K)
        w = _step(at_w, k - done, 1, BLOCK_K, EVEN_K)
        if TERMS == 1:
            total = tl.dot(w.to(x.dtype), x, total)
        else:
            wide = w.to(tl.bfloat16)
            rest = x.to(tl.float32)
            # in a sum of its own: small terms added to a large total would each be rounded to it
            block = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for _ in tl.static_range(TERMS):
                term = _upper_half(rest)
                block = tl.dot(wide, term.to(tl.bfloat16), block)
                rest = tl.where(rest == term, 0.0, rest - term)  # infinity leaves nothing
            total += block
        at_x += BLOCK_K
        at_w += BLOCK_K
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_SCALE:
        total *= tl.load(SCALE + column, mask=column < n, other=0.0)[:, None]
    if HAS_BIAS:
        total += tl.load(BIAS + column, mask=column < n, other=0.0).to(tl.float32)[:, None]
    to = row.to(tl.int64)[None, :] * n + column[:, None]
    mask = (row < m)[None, :] & (column < n)[:, None]
    tl.store(OUT + to, total.to(OUT.dtype.element_ty), mask=mask)
