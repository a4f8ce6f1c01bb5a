"""Launchers of csrc/cpu/rope.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm.cpu.common import dense_last, unavailable, wrong_dtype
from fastvlm.ops.dispatch import Kernel


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.fastvlm_cpu.rope(*map(dense_last, (q, k, cos, sin)), back)


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turn(q, k, cos, sin, False)


def _rope_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return _turn(grad_q, grad_k, cos, sin, True)


def _unsupported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    return wrong_dtype(q) or wrong_dtype(cos) or wrong_dtype(sin)


KERNELS = {
    "rope": Kernel("cpu", _rope, unavailable, _unsupported),
    "rope_backward": Kernel("cpu", _rope_backward, unavailable, _unsupported),
}
