"""Counter-based dropout, so that every backend can draw the same mask from one seed.

The bits of element ``i`` are splitmix64(seed + i) (Steele, Lea, Flood, OOPSLA 2014): no state, no
order, and forward and backward agree without a stored mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """seed int64 [1], counter int64 of any shape -> float64 in [0, 1), 53 bits."""
    z = (counter + 1) * _GOLDEN + seed
    z = (z ^ _shift_right(z, 30)) * _MIX1
    z = (z ^ _shift_right(z, 27)) * _MIX2
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 11).double() * 2.0**-53


def keep_scale(seed: Tensor, counter: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """0 where an element is dropped, 1 / (1 - p) where it is kept."""
    return (uniform(seed, counter) >= p).to(dtype) / (1.0 - p)


def elementwise(seed: Tensor, like: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """keep_scale for a [rows, columns] tensor, counter = row * columns + column."""
    counter = torch.arange(like.numel(), device=like.device).view(like.shape)
    return keep_scale(seed, counter, p, dtype)
