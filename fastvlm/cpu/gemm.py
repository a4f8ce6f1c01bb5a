"""x weight^T + bias by whatever is fastest here: our kernel for a few rows, a library for more.

PyTorch carries two libraries, its default and oneDNN. Which of them is the faster in float32
depends on the CPU (oneDNN twice as fast on some, level on others), so it is measured once in a
process.
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


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] weight [N, K]^T + bias [N] -> [M, N], any strides, one dtype of ours."""
    if few_rows(x) and weight.stride(-1) == 1:
        return torch.ops.fastvlm_cpu.linear(dense_last(x), weight, dense_bias(bias))
    return large_product(x, weight, bias)


def large_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same where x is known to have many rows."""
    if x.dtype == torch.float32 and x.numel() > 0 and weight.numel() > 0 and library() == "onednn":
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # it has no name for operands whose rows overlap
    x, weight = (t if _is_matrix(t) else t.contiguous() for t in (x, weight))
    return pytorch.onednn_linear(x, weight, bias)


def _is_matrix(x: Tensor) -> bool:
    return x.is_contiguous() or x.t().is_contiguous()


def library() -> str:
    """ "aten" or "onednn": FASTVLM_GEMM where it is set, else what measured faster."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return _measured() if _has_onednn() else "aten"
    if wanted not in _LIBRARIES:
        raise ValueError(f"{VARIABLE} must be one of {_LIBRARIES}; got {wanted!r}")
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
    x, weight = (torch.ones(n, 768, dtype=torch.float32, device="cpu") for n in (256, 1536))

    def seconds(function: Callable[[Tensor, Tensor, None], Tensor]) -> float:
        start = time.perf_counter()
        function(x, weight, None)
        return time.perf_counter() - start

    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        times = [(seconds(F.linear), seconds(_onednn)) for _ in range(6)][1:]
    aten, onednn = (min(column) for column in zip(*times))
    return "onednn" if aten > _CLEARLY_FASTER * onednn else "aten"
