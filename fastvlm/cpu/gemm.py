"""x weight^T + bias by whatever is fastest here: our kernels, or a library for what they do not.

A few rows stream the weight. For more, ours packs it in panels and does what follows the product
while it is in cache. PyTorch carries two libraries, its default and oneDNN, for products of a
transposed weight (a backward pass) and where they are clearly ahead. Which of them is the faster in
float32 depends on the CPU, so it is measured once in a process.
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
from fastvlm.cpu.common import dense_bias, dense_last

# Up to how many rows our kernel, which streams the weight from memory once, is ahead of the
# libraries; measured with a weight of 9216 x 2304, and not far from the truth where it changes
# slowly. bfloat16: on a CPU that multiplies it, where PyTorch's product is oneDNN's.
MAX_ROWS = 64
MAX_ROWS_ONEDNN = 40
MAX_ROWS_NATIVE_BF16 = 24

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


@cache
def _native_bf16() -> bool:
    return extension.capability() == "AVX512_BF16"


def few_rows(x: Tensor) -> bool:
    """Whether our kernel is the choice for x."""
    most = MAX_ROWS
    if x.dtype == torch.bfloat16 and _native_bf16():
        most = MAX_ROWS_NATIVE_BF16
    elif x.dtype == torch.float32 and x.shape[0] > MAX_ROWS_ONEDNN and library() == "onednn":
        most = MAX_ROWS_ONEDNN
    return x.shape[0] <= most


def packs(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernel for many rows, with weights in panels, is the choice for x.

    Its products and sums are float32 whatever the dtype: not for 16 bits where the CPU has products
    of its own for them.
    """
    if few_rows(x) or any(w.stride(-1) != 1 for w in weights):
        return False
    return packs_float32() if x.dtype == torch.float32 else _packs_16_bits()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] weight [N, K]^T + bias [N] -> [M, N], any strides, one dtype of ours."""
    if few_rows(x) and weight.stride(-1) == 1:
        return torch.ops.fastvlm_cpu.linear(dense_last(x), weight, dense_bias(bias))
    if packs(x, weight):
        return torch.ops.fastvlm_cpu.packed_linear(
            dense_last(x), weight, dense_bias(bias), None, None
        )
    return large_product(x, weight, bias)


def large_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same where x is known to have many rows."""
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
    """The faster library for a float32 product of 0.6 GFLOP, by the best of a few turns each."""
    aten, onednn = _seconds(F.linear, _onednn)
    return "onednn" if aten > _CLEARLY_FASTER * onednn else "aten"


def packs_float32() -> bool:
    """Whether our product serves float32 here: asked for, or about as fast as a library's."""
    return _may_pack() and (os.environ.get(VARIABLE) == PACKED or _packed_keeps_up())


def _packs_16_bits() -> bool:
    return _may_pack() and extension.capability() in ("AVX2", "AVX512")


def _may_pack() -> bool:
    return os.environ.get(VARIABLE, PACKED) == PACKED and extension.capability() is not None


@cache
def _packed_keeps_up() -> bool:
    def packed(x: Tensor, weight: Tensor, bias: None) -> Tensor:
        out: Tensor = torch.ops.fastvlm_cpu.packed_linear(x, weight, bias, None, None)
        return out

    ours, theirs = _seconds(packed, _onednn if library() == "onednn" else F.linear)
    return ours < _CLEARLY_FASTER * theirs


def _seconds(*functions: Callable[[Tensor, Tensor, None], Tensor]) -> list[float]:
    """The best time of each for a float32 product of 0.6 GFLOP, in turns."""
    x, weight = (torch.ones(n, 768, dtype=torch.float32, device="cpu") for n in (256, 1536))

    def seconds(function: Callable[[Tensor, Tensor, None], Tensor]) -> float:
        start = time.perf_counter()
        function(x, weight, None)
        return time.perf_counter() - start

    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        times = [tuple(map(seconds, functions)) for _ in range(6)][1:]
    return [min(column) for column in zip(*times)]
