"""What the calls of all floors share: sizes of the models, and tensors that nobody fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Build = Callable[[torch.dtype], tuple[Any, ...]]

# width: heads, heads of k and v, head_dim
FLORENCE = {768: (12, 12, 64), 1024: (16, 16, 64)}
GEMMA = {2304: (8, 4, 256), 3584: (16, 8, 256)}
# the widest rows that the kernels of each norm take, forward and backward
WIDE_RMS, WIDE_RMS_BACKWARD = (16384,), (4096, 8192)
WIDE_LAYER, WIDE_LAYER_BACKWARD = (8192,), (4096,)
TRAINING, STEP = 4096, 32
ROWS = (TRAINING, STEP)
EPS, OFFSET, DROPOUT = 1e-6, 1.0, 0.1


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def seed(on: bool) -> Tensor | None:
    return torch.empty((), dtype=torch.int64) if on else None


def frozen(n: int, *frozen: int) -> list[bool]:
    """needs, with those at the given places off."""
    return [place not in frozen for place in range(n)]


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype)
