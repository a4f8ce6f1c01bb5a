"""Launchers of the MLPs and of the product with a stored weight.

Whose product is whose. Ours are those that something is fused to, all [rows, F]:

    x w_gate^T, x w_up^T    two products by one reading of x, GELU and the product in the epilogue
    x w1^T + b1             GELU and dropout in the epilogue
    grad w_down, grad w2    the activation's derivative in the epilogue, sums for the bias
    x w^T, w stored in      widened in registers, so that a decoding step reads the stored bytes
    bfloat16 or int8

`library_serves` says which products are cuBLAS's instead, and why.

No product is split over K: with few rows the tiles are narrow instead, which fills the device with
programs and needs no second launch to add up parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvlm.triton import configs
from fastvlm.triton.common import (
    Launcher,
    cdiv,
    dense_last,
    device_of,
    dot_precision,
    is_tanh,
    keep_threshold,
    multiprocessors,
    next_power_of_2,
    not_gelu,
    unsupported_dtype,
)
from fastvlm.triton.configs import Config
from fastvlm.triton.kernels import mlp as kernels

# rows up to which low_precision_linear has them all in one tile and reads each weight once
STREAMED = 64


def library_serves(x: Tensor, weight: Tensor, *, fused: bool, stored: bool = False) -> bool:
    """Whether the library (cuBLAS, hipBLASLt on ROCm) computes a product, and not a kernel of ours.

    fused: an activation, its derivative or a second product is in it. Ours: the library would write
    the product to memory for another launch to read.
    Neither fused nor stored: the down projections, the gradients of x and of every weight, and
    `linear`, which is PyTorch's own. The library's: nothing is saved by fusing, and its
    hand-scheduled kernels are the ones to beat.
    stored: the weight of `low_precision_linear`. Ours where it is of another dtype than x, since
    the library would need it widened in memory, and up to STREAMED rows, where the time is that of
    reading the weight once; a bfloat16 weight at more rows of bfloat16 is a plain product.
    """
    if fused:
        return False
    return not stored or (weight.dtype == x.dtype and x.shape[0] > STREAMED)


def _product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, *, plus: Tensor | None = None
) -> Tensor:
    """a [M, K] b [K, N] + bias [N], or + plus [M, N], which is overwritten; by the library."""
    assert library_serves(a, b, fused=False)
    if plus is not None:
        return plus.addmm_(a, b)
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def _launch(kernel: str, x: Tensor, w: Tensor, run: Callable[[Config], None], *size: int) -> None:
    """A product with something fused to it. size: its columns and its depth."""
    assert not library_serves(x, w, fused=True)
    with device_of(x):
        configs.launch(kernel, x, run, **_key(x, *size))


def _key(x: Tensor, columns: int, depth: int) -> dict[str, int]:
    """What a config is chosen by; the rows in powers of two, since batches differ."""
    rows = max(16, min(8192, next_power_of_2(x.shape[0])))
    return {"rows": rows, "columns": columns, "depth": depth, "bits": 8 * x.element_size()}


def _tiles(m: int, n: int, config: Config) -> tuple[int]:
    """The grid that has a program for each tile."""
    return (cdiv(m, config.blocks["BLOCK_M"]) * cdiv(n, config.blocks["BLOCK_N"]),)


def _grid(x: Tensor, n: int, config: Config) -> tuple[int]:
    """The grid of a forward kernel: as many programs as the device holds, where it is persistent.

    That it is in training, whose tiles are many more than that: the programs walk over them. With
    few rows there is a tile for each program, or less. In the backward kernels the walk costs 30 to
    50 registers, with which a multiprocessor of compute capability 9 holds one program instead of
    two (128 x 128 tiles), so they, and `low_precision_linear`, made for few rows, have none.
    """
    tiles = _tiles(x.shape[0], n, config)[0]
    return (min(tiles, multiprocessors(x) * config.resident) if config.resident else tiles,)


def _even(depth: int, config: Config) -> bool:
    return depth % config.blocks["BLOCK_K"] == 0


def _rows_of(x: Tensor, columns: int, need: bool) -> Tensor:
    return x.new_empty(x.shape[0], columns) if need else x.new_empty(0)


def _dropout(seed: Tensor | None, dropout_p: float) -> tuple[bool, int, float]:
    """Whether there is one, the generator's threshold, the factor of what is kept."""
    on = seed is not None and dropout_p > 0
    return on, keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p)


def _geglu_mlp(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, w_gate, w_up = dense_last(x), dense_last(w_gate), dense_last(w_up)
    (m, k), f = x.shape, w_gate.shape[0]
    hidden, gate, up = _rows_of(x, f, True), _rows_of(x, f, keep), _rows_of(x, f, keep)
    tanh, precision = is_tanh(activation), dot_precision(x)

    def run(config: Config) -> None:
        kernels.geglu_forward[_grid(x, f, config)](
            x, w_gate, w_up, hidden, gate, up, x.stride(0), w_gate.stride(0), w_up.stride(0),
            m, f, k, TANH=tanh, KEEP=keep, PRECISION=precision, EVEN_K=_even(k, config),
            PERSISTENT=config.resident > 0, **config.arguments,
        )  # fmt: skip

    if hidden.numel():
        _launch("geglu_forward", x, w_gate, run, f, k)
    return _product(hidden, w_down.t()), gate, up


def _geglu_mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, w = dense_last(grad_out), dense_last(w_down)
    gate, up = gate.contiguous(), up.contiguous()
    (m, n), f = grad.shape, w.shape[1]
    need_gate, need_up, need_hidden = needs[0] or needs[1], needs[0] or needs[2], needs[3]
    dgate, dup = _rows_of(grad, f, need_gate), _rows_of(grad, f, need_up)
    hidden = _rows_of(grad, f, need_hidden)
    tanh, precision = is_tanh(activation), dot_precision(x)

    def run(config: Config) -> None:
        kernels.geglu_backward[_tiles(m, f, config)](
            grad, w, gate, up, dgate, dup, hidden, grad.stride(0), w.stride(0), m, f, n,
            TANH=tanh, NEED_GATE=need_gate, NEED_UP=need_up, NEED_HIDDEN=need_hidden,
            PRECISION=precision, EVEN_K=_even(n, config), **config.arguments,
        )  # fmt: skip

    if gate.numel() and any(needs):
        _launch("geglu_backward", grad, w, run, f, n)
    return (
        _product(dup, w_up, plus=_product(dgate, w_gate)) if needs[0] else x.new_empty(0),
        _product(dgate.t(), x) if needs[1] else x.new_empty(0),
        _product(dup.t(), x) if needs[2] else x.new_empty(0),
        _product(grad.t(), hidden) if needs[3] else x.new_empty(0),
    )


def _gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    activation: int,
    dropout_p: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    x, w1 = dense_last(x), dense_last(w1)
    b1 = None if b1 is None else dense_last(b1)
    (m, k), f = x.shape, w1.shape[0]
    hidden, pre = _rows_of(x, f, True), _rows_of(x, f, keep)
    on, threshold, factor = _dropout(seed, dropout_p)
    tanh, precision = is_tanh(activation), dot_precision(x)

    def run(config: Config) -> None:
        kernels.gelu_forward[_grid(x, f, config)](
            x, w1, b1, seed, hidden, pre, x.stride(0), w1.stride(0), m, f, k, threshold, factor,
            TANH=tanh, HAS_BIAS=b1 is not None, DROPOUT=on, KEEP=keep, PRECISION=precision,
            EVEN_K=_even(k, config), PERSISTENT=config.resident > 0, **config.arguments,
        )  # fmt: skip

    if hidden.numel():
        _launch("gelu_forward", x, w1, run, f, k)
    return _product(hidden, w2.t(), b2), pre


def _gelu_mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    pre: Tensor,
    w1: Tensor,
    w2: Tensor,
    seed: Tensor | None,
    activation: int,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, w, pre = dense_last(grad_out), dense_last(w2), pre.contiguous()
    (m, n), f = grad.shape, w.shape[1]
    need_pre, need_bias, need_hidden = needs[0] or needs[1], needs[2], needs[3]
    dpre, hidden = _rows_of(grad, f, need_pre), _rows_of(grad, f, need_hidden)
    sums = torch.empty(0, f, dtype=torch.float32, device=x.device)
    on, threshold, factor = _dropout(seed, dropout_p)
    tanh, precision = is_tanh(activation), dot_precision(x)

    def run(config: Config) -> None:
        nonlocal sums
        if need_bias:
            sums = sums.new_empty(cdiv(m, config.blocks["BLOCK_M"]), f)
        kernels.gelu_backward[_tiles(m, f, config)](
            grad, w, pre, seed, dpre, hidden, sums, grad.stride(0), w.stride(0), m, f, n,
            threshold, factor, TANH=tanh, DROPOUT=on, NEED_PRE=need_pre, NEED_HIDDEN=need_hidden,
            NEED_BIAS=need_bias, PRECISION=precision, EVEN_K=_even(n, config),
            **config.arguments,
        )  # fmt: skip

    if pre.numel() and any(needs[:4]):
        _launch("gelu_backward", grad, w, run, f, n)
    return (
        _product(dpre, w1) if needs[0] else x.new_empty(0),
        _product(dpre.t(), x) if needs[1] else x.new_empty(0),
        sums.sum(0).to(x.dtype) if needs[2] else x.new_empty(0),
        _product(grad.t(), hidden) if needs[3] else x.new_empty(0),
        # accumulated in float32 whatever the dtype
        grad.sum(0) if needs[4] else x.new_empty(0),
    )


def _low_precision_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    (m, k), n = x.shape, weight.shape[0]
    if library_serves(x, weight, fused=False, stored=True):
        return _product(x, weight.t(), bias)
    x, weight = dense_last(x), dense_last(weight)
    scale = None if scale is None else dense_last(scale)
    bias = None if bias is None else dense_last(bias)
    out = x.new_empty(m, n)
    if x.dtype == torch.float32:
        terms = 3
    else:
        terms = 2 if (x.dtype, weight.dtype) == (torch.float16, torch.bfloat16) else 1

    def run(config: Config) -> None:
        kernels.low_precision_linear[_tiles(m, n, config)](
            x, weight, scale, bias, out, x.stride(0), weight.stride(0), m, n, k,
            TERMS=terms, HAS_SCALE=scale is not None, HAS_BIAS=bias is not None,
            EVEN_K=_even(k, config), **config.arguments,
        )  # fmt: skip

    if out.numel():
        stored = 8 * weight.element_size()
        key = _key(x, n, k)
        with device_of(x):
            configs.launch("low_precision_linear", x, run, **key, stored=stored, terms=terms)
    return out


def _unsupported(place: int) -> Callable[..., str | None]:
    """Why a call cannot be served. place: of the activation among the arguments."""

    def unsupported(*args: Any) -> str | None:
        return not_gelu(args[place]) or unsupported_dtype(*args)

    return unsupported


LAUNCHERS = {
    "geglu_mlp": Launcher(_geglu_mlp, _unsupported(4)),
    "geglu_mlp_backward": Launcher(_geglu_mlp_backward, _unsupported(7)),
    "gelu_mlp": Launcher(_gelu_mlp, _unsupported(6)),
    "gelu_mlp_backward": Launcher(_gelu_mlp_backward, _unsupported(6)),
    "low_precision_linear": Launcher(_low_precision_linear),
}
