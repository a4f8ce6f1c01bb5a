"""The one bound for numbers: ours may be off by at most twice what PyTorch in the same dtype is."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD, BACKWARD = 2.0, 3.0


def check(name: str, ours: Tensor, torchs: Tensor, exact: Tensor, factor: float) -> None:
    """max |ours - exact| <= factor * max |torchs - exact| + tiny; exact is float64.

    tiny is two roundings of the largest exact value in ours' dtype, one for what lies between the
    two products of an op and one for the result: what no result in that dtype can be blamed for.
    """
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, not {list(exact.shape)}"
    assert ours.dtype == torchs.dtype, f"{name}: {ours.dtype}, not {torchs.dtype}"
    assert ours.isfinite().all(), f"{name}: NaN or infinity"
    assert exact.dtype == torch.float64
    assert torchs.isfinite().all(), f"{name}: PyTorch's own result allows anything: choose others"
    if exact.numel() == 0:
        return
    error = (ours.double() - exact).abs().max()
    allowed = (torchs.double() - exact).abs().max()
    tiny = 2 * torch.finfo(ours.dtype).eps * exact.abs().max()
    assert error <= factor * allowed + tiny, (
        f"{name}: off by {error:.3e}; PyTorch in {ours.dtype} by {allowed:.3e}, tiny {tiny:.3e}"
    )
