"""The one bound for numbers: ours may be off by at most twice what PyTorch in the same dtype is."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD, BACKWARD = 2.0, 3.0


DRAWS = 8  # of inputs, where PyTorch may have been right by luck with one

# ours, PyTorch's, exact
Results = tuple[Tensor, Tensor, Tensor]


def check(name: str, ours: Tensor, torchs: Tensor, exact: Tensor, factor: float) -> None:
    """max |ours - exact| <= factor * max |torchs - exact| + tiny; exact is float64.

    tiny is two roundings of the largest exact value in ours' dtype, one for what lies between the
    two products of an op and one for the result: what no result in that dtype can be blamed for.
    """
    wrong = breach([(ours, torchs, exact)], factor)
    refuse({} if wrong is None else {name: wrong})


def refuse(broken: dict[str, str]) -> None:
    """AssertionError with what breaks the rule, by name, if anything does."""
    assert not broken, "; ".join(f"{name}: {how}" for name, how in broken.items())


def breach(draws: list[Results], factor: float) -> str | None:
    """How the worst of ours in some draws breaks the rule beside the worst of PyTorch's; None where
    it does not. AssertionError where they cannot be compared."""
    for ours, torchs, exact in draws:
        assert ours.shape == exact.shape, f"shape {list(ours.shape)}, not {list(exact.shape)}"
        assert ours.dtype == torchs.dtype, f"{ours.dtype}, not {torchs.dtype}"
        assert ours.isfinite().all(), "NaN or infinity"
        assert exact.dtype == torch.float64
        assert torchs.isfinite().all(), "PyTorch's own result allows anything: choose others"
    if draws[0][2].numel() == 0:
        return None
    dtype = draws[0][0].dtype
    error = max(float((ours.double() - exact).abs().max()) for ours, _, exact in draws)
    allowed = max(float((torchs.double() - exact).abs().max()) for _, torchs, exact in draws)
    tiny = 2 * torch.finfo(dtype).eps * max(float(exact.abs().max()) for *_, exact in draws)
    if error <= factor * allowed + tiny:
        return None
    return f"off by {error:.3e}; PyTorch in {dtype} by {allowed:.3e}, tiny {tiny:.3e}"
