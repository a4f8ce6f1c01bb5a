"""Normalizations: a program takes whole rows, each in registers, float32 inside.

The backward kernels walk over some rows and keep the sums for the weights in registers; each
program leaves its sums in a row of its own, so that they are added in one order, whatever the
schedule. How many rows there are is no part of a specialization: packed batches differ in it, and
each new number would be a compilation in the middle of training.
"""

import triton
import triton.language as tl

from fastvlm.triton.kernels.random import kept


@triton.jit
def _row(POINTER, row, stride, columns, mask):
    return tl.load(POINTER + row * stride + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put(POINTER, row, n, columns, mask, value):
    tl.store(POINTER + row * n + columns, value.to(POINTER.dtype.element_ty), mask=mask)


@triton.jit
def _vector(POINTER, columns, mask):
    return tl.load(POINTER + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rstd(x, n, eps):
    return tl.rsqrt(tl.sum(x * x, 0) / n + eps)


@triton.jit
def _tanh_of_one(x):
    """tanh of a scalar, in terms that do not cancel."""
    magnitude = tl.abs(x)
    z = x * x
    # below 1/8 the series to x^7 is exact in float32; above it 1 - e^-2x loses nothing that counts
    series = x * (1.0 + z * (-1.0 / 3.0 + z * (2.0 / 15.0 - z * (17.0 / 315.0))))
    e = tl.exp(-2.0 * magnitude)
    large = (1.0 - e) / (1.0 + e)
    return tl.where(magnitude < 0.125, series, tl.where(x < 0, -large, large))


@triton.jit
def _tanh_slope(x):
    """1 - tanh(x)^2 without its cancellation."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def rms_norm(
    X, WEIGHT, OUT, stride_x, n, eps, offset, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    x = _row(X, row, stride_x, columns, mask)
    w = offset + _vector(WEIGHT, columns, mask)
    _put(OUT, row, n, columns, mask, x * _rstd(x, n, eps) * w)


@triton.jit
def _both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _rms_backward(grad, x, w, n, eps):
    """dx; grad * normed, whose sum over the rows is dweight; grad . output. w has its offset."""
    scaled = grad * w
    # both sums of a row by one trip through shared memory
    squares, along = tl.reduce((x * x, scaled * x), 0, _both)
    rstd = tl.rsqrt(squares / n + eps)
    along *= rstd
    normed = x * rstd
    dx = rstd * (scaled - normed * (along / n))
    return dx, grad * normed, along


@triton.jit(do_not_specialize=["m", "rows"])
def rms_norm_backward(
    GRAD, X, WEIGHT, DX, DWEIGHT, stride_g, stride_x, m, n, rows, eps, offset,
    NEED_X: tl.constexpr, NEED_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    w = offset + _vector(WEIGHT, columns, mask)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(part * rows, tl.minimum(part * rows + rows, m)):
        x = _row(X, row, stride_x, columns, mask)
        grad = _row(GRAD, row, stride_g, columns, mask)
        dx, dw, _ = _rms_backward(grad, x, w, n, eps)
        if NEED_X:
            _put(DX, row, n, columns, mask, dx)
        total += dw
    if NEED_W:
        _put(DWEIGHT, part, n, columns, mask, total)


@triton.jit
def residual_rms_norm(
    X, RESIDUAL, WEIGHT, GATE, NEXT, H, Y, stride_x, stride_r, n, eps, offset,
    HAS_GATE: tl.constexpr, HAS_NEXT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    x = _row(X, row, stride_x, columns, mask)
    w = offset + _vector(WEIGHT, columns, mask)
    branch = x * _rstd(x, n, eps) * w
    if HAS_GATE:
        branch *= _tanh_of_one(tl.load(GATE).to(tl.float32))
    # the next norm reads h as it is stored
    h = (_row(RESIDUAL, row, stride_r, columns, mask) + branch).to(H.dtype.element_ty)
    tl.store(H + row * n + columns, h, mask=mask)
    if HAS_NEXT:
        h = h.to(tl.float32)
        following = offset + _vector(NEXT, columns, mask)
        _put(Y, row, n, columns, mask, h * _rstd(h, n, eps) * following)


@triton.jit(do_not_specialize=["m", "rows"])
def residual_rms_norm_backward(
    GRAD_H, GRAD_Y, X, H, WEIGHT, GATE, NEXT, DX, DRESIDUAL, DWEIGHT, DGATE, DNEXT,
    stride_gh, stride_gy, stride_x, stride_h, m, n, rows, eps, offset,
    HAS_GRAD_H: tl.constexpr, HAS_GRAD_Y: tl.constexpr, HAS_GATE: tl.constexpr,
    NEED_X: tl.constexpr, NEED_RESIDUAL: tl.constexpr, NEED_W: tl.constexpr,
    NEED_GATE: tl.constexpr, NEED_NEXT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    w = offset + _vector(WEIGHT, columns, mask)
    gate = 1.0
    if HAS_GATE:
        raw = tl.load(GATE).to(tl.float32)
        gate = _tanh_of_one(raw)
    if HAS_GRAD_Y:
        following = offset + _vector(NEXT, columns, mask)
    dweight = tl.zeros([BLOCK], tl.float32)
    dnext = tl.zeros([BLOCK], tl.float32)
    dgate = 0.0
    for row in range(part * rows, tl.minimum(part * rows + rows, m)):
        dh = tl.zeros([BLOCK], tl.float32)
        if HAS_GRAD_H:
            dh = _row(GRAD_H, row, stride_gh, columns, mask)
        if HAS_GRAD_Y:
            h = _row(H, row, stride_h, columns, mask)
            grad = _row(GRAD_Y, row, stride_gy, columns, mask)
            through, dn, _ = _rms_backward(grad, h, following, n, eps)
            dh += through
            dnext += dn
        if NEED_RESIDUAL:
            _put(DRESIDUAL, row, n, columns, mask, dh)
        if NEED_X or NEED_W or NEED_GATE:
            x = _row(X, row, stride_x, columns, mask)
            # all three are linear in the gradient: the gate, 0 at first, is put in afterwards
            dx, dw, along = _rms_backward(dh, x, w, n, eps)
            if NEED_X:
                _put(DX, row, n, columns, mask, dx * gate)
            dweight += dw
            dgate += along
    if NEED_W:
        _put(DWEIGHT, part, n, columns, mask, dweight * gate)
    if NEED_NEXT:
        _put(DNEXT, part, n, columns, mask, dnext)
    if NEED_GATE:
        tl.store(DGATE + part, dgate * _tanh_slope(raw))


@triton.jit
def _sum_with_dropout(
    X, RESIDUAL, row, stride_x, stride_r, n, columns, mask, seed, threshold, factor,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """residual + dropout(x), and the factor of each element of x."""
    scale = tl.full(columns.shape, 1.0, tl.float32)
    if DROPOUT:
        scale = tl.where(kept(seed, row * n + columns, threshold), factor, 0.0)
    x = _row(X, row, stride_x, columns, mask)
    return _row(RESIDUAL, row, stride_r, columns, mask) + x * scale, scale


@triton.jit
def _all_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _centred(z, n, mask, eps):
    """z without its mean, and 1 / its deviation."""
    centred = tl.where(mask, z - tl.sum(z, 0) / n, 0.0)
    return centred, _rstd(centred, n, eps)


@triton.jit(do_not_specialize=["threshold"])
def residual_layer_norm(
    X, RESIDUAL, WEIGHT, BIAS, SEED, OUT, stride_x, stride_r, n, eps, threshold, factor,
    DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    seed = tl.full([], 0, tl.int64)
    if DROPOUT:
        seed = tl.load(SEED)
    z, _ = _sum_with_dropout(
        X, RESIDUAL, row, stride_x, stride_r, n, columns, mask, seed, threshold, factor, DROPOUT
    )
    centred, rstd = _centred(z, n, mask, eps)
    out = centred * rstd * _vector(WEIGHT, columns, mask) + _vector(BIAS, columns, mask)
    _put(OUT, row, n, columns, mask, out)


@triton.jit(do_not_specialize=["m", "rows", "threshold"])
def residual_layer_norm_backward(
    GRAD, X, RESIDUAL, WEIGHT, SEED, DX, DRESIDUAL, DWEIGHT, DBIAS,
    stride_g, stride_x, stride_r, m, n, rows, eps, threshold, factor,
    DROPOUT: tl.constexpr, NEED_X: tl.constexpr, NEED_RESIDUAL: tl.constexpr,
    NEED_W: tl.constexpr, NEED_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    w = _vector(WEIGHT, columns, mask)
    seed = tl.full([], 0, tl.int64)
    if DROPOUT:
        seed = tl.load(SEED)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for row in range(part * rows, tl.minimum(part * rows + rows, m)):
        z, scale = _sum_with_dropout(
            X, RESIDUAL, row, stride_x, stride_r, n, columns, mask, seed, threshold, factor, DROPOUT
        )
        grad = _row(GRAD, row, stride_g, columns, mask)
        centred = tl.where(mask, z - tl.sum(z, 0) / n, 0.0)
        scaled = grad * w
        squares, of_mean, along = tl.reduce(
            (centred * centred, scaled, scaled * centred), 0, _all_three
        )
        rstd = tl.rsqrt(squares / n + eps)
        normed = centred * rstd
        dweight += grad * normed
        dbias += grad
        dz = rstd * (scaled - of_mean / n - normed * (along * rstd / n))
        if NEED_RESIDUAL:
            _put(DRESIDUAL, row, n, columns, mask, dz)
        if NEED_X:
            _put(DX, row, n, columns, mask, dz * scale)
    if NEED_W:
        _put(DWEIGHT, part, n, columns, mask, dweight)
    if NEED_BIAS:
        _put(DBIAS, part, n, columns, mask, dbias)
