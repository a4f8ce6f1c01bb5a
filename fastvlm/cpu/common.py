"""What the launchers of the CPU backend share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm import extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    return None if extension.available() else extension.reason()


def wrong_dtype(x: Tensor) -> str | None:
    return None if x.dtype in DTYPES else f"{x.dtype} (it has float32, bfloat16, float16)"


def wrong_floats(*arguments: Any) -> str | None:
    """The same of the first tensor of another dtype among some, int8 weights left out."""
    given = (t for t in arguments if isinstance(t, Tensor) and t.dtype != torch.int8)
    return next((wrong_dtype(t) for t in given if t.dtype not in DTYPES), None)


def dense_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else dense_last(bias)


def dense_last(x: Tensor) -> Tensor:
    """Kernels take any strides but in the last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def dense_one(x: Tensor) -> Tensor:
    """[M, K] for the products that take transposes as well: either dimension is dense."""
    return x if x.stride(0) == 1 else dense_last(x)
