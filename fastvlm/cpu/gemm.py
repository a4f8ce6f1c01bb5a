"""x weight^T + bias by whatever is fastest here: our kernels, or a library for what they do not.

A few rows stream the weight. For more, ours packs it in panels, also where x or the weight is a
transpose (a backward pass), and does what follows the product while it is in cache. PyTorch carries
two libraries, its default and oneDNN, for where they are clearly ahead and for few rows of a
transposed weight. Which of them is the faster in float32 depends on the CPU, so it is measured once
in a process.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm import extension
from fastvlm.compat import pytorch
from fastvlm.cpu import bf16
from fastvlm.cpu.common import dense_bias, dense_last, dense_one

# Up to how many rows our kernel, which streams the weight from memory once, is ahead of the
# libraries; measured with a weight of 9216 x 2304, and not far from the truth where it changes
# slowly. bfloat16: on a CPU that multiplies it, where PyTorch's product is oneDNN's.
MAX_ROWS = 64
MAX_ROWS_ONEDNN = 40
MAX_ROWS_NATIVE_BF16 = 24
# where it multiplies tiles of bfloat16 (AMX), which rows of whole ones can be
MAX_ROWS_TILES = 256
_TILE_DEPTH = 32
# of a product in tiles with nothing behind it: where rows, depth or columns are fewer (LoRA's 8, a
# tower's first 128) a library is ahead, which has a kernel for each shape
_LEAST_TILED = 256

VARIABLE = "FASTVLM_GEMM"
_LIBRARIES = ("aten", "onednn")
PACKED = "packed"
# a row of x more is no other shape of oneDNN's, nor are many rows; depths, which in a backward pass
# are rows too, come in steps of an eighth at most
_ONEDNN_STEP = 128
_MOST_ONEDNN_ROWS = 1024
# the other library's results differ in the last bits: only a clear gain is worth that, and only a
# clear gain is found again by the next process
_CLEARLY_FASTER = 1.25
_TURNS = 5

_Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@cache
def _native_bf16() -> bool:
    return extension.capability() in ("AVX512_BF16", "AMX")


def few_rows(x: Tensor, *weights: Tensor) -> bool:
    """Whether our kernel is the choice for x with these weights [N, K], or with whole ones."""
    most = MAX_ROWS
    if x.dtype == torch.bfloat16 and _native_bf16():
        tiles = bf16.tiles() and all(map(_holds_tiles, (x, *weights)))
        tiles = tiles and all(w.shape[0] >= _TILE_DEPTH for w in weights)
        most = MAX_ROWS_TILES if tiles else MAX_ROWS_NATIVE_BF16
    elif x.dtype == torch.float32 and x.shape[0] > MAX_ROWS_ONEDNN and library() == "onednn":
        most = MAX_ROWS_ONEDNN
    return x.shape[0] <= most


def _holds_tiles(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] % _TILE_DEPTH == 0


def packs(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernel for many rows, with weights in panels, is the choice for x.

    Its products and sums are float32 whatever the dtype: not for 16 bits where the CPU has products
    of its own for them, unless ours are in tiles.
    """
    if few_rows(x, *weights):
        return False
    if x.dtype == torch.float32:
        return packs_float32()
    return _packs_16_bits() or (in_tiles(x) and may_pack())


def in_tiles(x: Tensor) -> bool:
    """Whether products of many rows like x are those of bfloat16 tiles (AMX)."""
    return x.dtype == torch.bfloat16 and bf16.tiles()


def streams(x: Tensor, *weights: Tensor) -> bool:
    """Whether our kernel is the choice for x and weights [N, K], rows or columns contiguous."""
    return few_rows(x, *weights) and all(1 in w.stride() for w in weights)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] weight [N, K]^T + bias [N] -> [M, N], any strides, one dtype of ours."""
    if streams(x, weight):
        return torch.ops.fastvlm_cpu.linear(dense_last(x), weight, dense_bias(bias))
    if packs(x, weight) and not _is_thin(x, weight):
        return packed_product(x, weight, bias)
    return _by_library(x, weight, bias)


def _is_thin(x: Tensor, weight: Tensor) -> bool:
    return in_tiles(x) and min(*x.shape, weight.shape[0]) < _LEAST_TILED


def added_product(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """total [M, N] + x weight^T; may write over total."""
    if packs(x, weight):
        return packed_product(x, weight, residual=total)
    return total.add_(product(x, weight))


def packed_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """residual + factors (x weight^T + bias), where `packs`. factors: of as many rows each."""
    if in_tiles(x):
        return bf16.bf16_linear(x, weight, None, bias, residual, factors)
    out: Tensor = torch.ops.fastvlm_cpu.packed_linear(
        *(dense_one(x), dense_one(weight), dense_bias(bias)),
        *(None if residual is None else dense_last(residual), factors),
    )
    return out


def packed_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    factors: Tensor | None,
    activation: int,
) -> Tensor:
    """residual + factors (activation(x w1^T + b1) w2^T + b2), where `packs`."""
    if in_tiles(x):
        return bf16.bf16_gelu_mlp(
            *(x, w1, None, b1, w2, None, b2, residual, factors, activation),
        )
    out: Tensor = torch.ops.fastvlm_cpu.packed_mlp(
        *(dense_one(x), dense_one(w1), dense_bias(b1), dense_one(w2), dense_bias(b2)),
        *(None if residual is None else dense_last(residual), factors, activation),
    )
    return out


def _by_library(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dtype == torch.float32 and x.numel() > 0 and weight.numel() > 0 and library() == "onednn":
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In few shapes: oneDNN keeps a kernel, and room for it, for each one that it has seen."""
    depth = _up(x.shape[1], max(_ONEDNN_STEP, 1 << max(0, x.shape[1].bit_length() - 4)))
    weight = _padded(weight, weight.shape[0], depth)
    parts = [
        pytorch.onednn_linear(_padded(part, _up(part.shape[0], _ONEDNN_STEP), depth), weight, bias)
        for part in x.split(_MOST_ONEDNN_ROWS)
    ]
    return parts[0][: x.shape[0]] if len(parts) == 1 else torch.cat(parts)[: x.shape[0]]


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _padded(x: Tensor, rows: int, cols: int) -> Tensor:
    """x with zeros around it, as a matrix or the transpose of one: oneDNN has no name for operands
    whose rows overlap."""
    if x.shape == (rows, cols):
        return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()
    if x.stride(0) == 1 < x.stride(1):
        return _padded(x.t(), cols, rows).t()
    out = x.new_zeros(rows, cols)
    out[: x.shape[0], : x.shape[1]] = x
    return out


def library() -> str:
    """ "aten" or "onednn", of the products that go to a library: FASTVLM_GEMM where it is set to
    one, else what measured faster."""
    wanted = os.environ.get(VARIABLE, PACKED)
    if wanted == PACKED:
        return _measured() if _has_onednn() else "aten"
    if wanted not in _LIBRARIES:
        raise ValueError(f"{VARIABLE} must be one of {(*_LIBRARIES, PACKED)}; got {wanted!r}")
    if wanted == "onednn" and not _has_onednn():
        raise ValueError(f"{VARIABLE}=onednn, but this PyTorch has no oneDNN or it is switched off")
    return wanted


def _has_onednn() -> bool:
    usable = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return usable and pytorch.has_onednn_linear()


_lock = threading.Lock()


def _measured() -> str:
    with _lock:
        return _measure()


@cache
def _measure() -> str:
    return "onednn" if _is_ahead(_onednn, F.linear) else "aten"


def packs_float32() -> bool:
    """Whether our product serves float32 here: asked for, or about as fast as a library's."""
    return may_pack() and (os.environ.get(VARIABLE) == PACKED or _packed_keeps_up())


def _packs_16_bits() -> bool:
    return may_pack() and extension.capability() in ("AVX2", "AVX512")


def may_pack() -> bool:
    """Whether our products of many rows may serve: they are there, and no library is asked for."""
    return os.environ.get(VARIABLE, PACKED) == PACKED and extension.capability() is not None


@cache
def _packed_keeps_up() -> bool:
    return not _is_ahead(_onednn if library() == "onednn" else F.linear, packed_product)


def _is_ahead(one: _Product, other: _Product) -> bool:
    """Whether `one` is clearly the faster in nearly every turn of the products of a layer: forward
    and backward, 0.9 GFLOP of float32, of no round number of rows. By turns, for what else runs on
    the machine (a loader's workers begin when training does) would decide between two best times.
    """
    x, weight = (torch.ones(n, 768, dtype=torch.float32, device="cpu") for n in (250, 768))
    y = x.clone()

    def seconds(product: _Product) -> float:
        start = time.perf_counter()
        product(x, weight, None)
        product(y, weight.t(), None)
        product(y.t(), x.t(), None)
        return time.perf_counter() - start

    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        turns = [(seconds(one), seconds(other)) for _ in range(1 + _TURNS)][1:]
    wins = sum(theirs > _CLEARLY_FASTER * ours for ours, theirs in turns)
    return wins >= _TURNS - 1
