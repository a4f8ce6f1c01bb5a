"""Launchers of csrc/cpu/merge.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm.cpu.common import unavailable, wrong_dtype
from fastvlm.ops.dispatch import Kernel


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    rows = (x.contiguous() for x in (out, lse, other, other_lse))
    return torch.ops.fastvlm_cpu.merge_attention(*rows)


def _merge_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (x.contiguous() for x in (grad_out, out, lse, other, other_lse))
    return torch.ops.fastvlm_cpu.merge_attention_backward(*rows)


def _unsupported(first: Tensor, *rest: Tensor) -> str | None:
    return wrong_dtype(first)


KERNELS = {
    "merge_attention": Kernel("cpu", _merge, unavailable, _unsupported),
    "merge_attention_backward": Kernel("cpu", _merge_backward, unavailable, _unsupported),
}
