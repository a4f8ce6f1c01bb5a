"""Short checks of the CUDA kernels, one for each kind of work: what planted bugs must not pass."""

from __future__ import annotations

from collections.abc import Callable

import plain
import torch

from fastvlm import ops
from fastvlm.cuda import norm
from fastvlm.ops import norm as public
from fastvlm.reference._random import elementwise

Rule = Callable[..., None]
SEED = torch.tensor([12345])


def randn(*shape: int, grad: bool = False, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def rms(rule: Rule) -> None:
    """Three warps, a tail in the last chunk, several rows to a block backward."""
    before, norm._rows_per_block = norm._rows_per_block, lambda x: 2
    try:
        for n, dtype in ((600, torch.bfloat16), (333, torch.float32)):
            inputs = [randn(*s, grad=True, dtype=dtype) for s in ((5, n), (5, n), (n,), (1,), (n,))]
            # in float32 PyTorch's own error in this one number is now and then next to nothing
            inputs[3].requires_grad_(dtype == torch.bfloat16)
            rule(
                lambda x, r, w, g, y: ops.residual_rms_norm(x, r, w, gate=g, next_weight=y),
                plain.residual_rms_norm,
                inputs,
            )
            rule(ops.rms_norm, plain.rms_norm, [inputs[0], inputs[2]])
    finally:
        norm._rows_per_block = before


def layer(rule: Rule) -> None:
    before, norm._rows_per_block = norm._rows_per_block, lambda x: 2
    seed_before, public.seed_for = public.seed_for, lambda x, p: SEED if p else None
    try:
        # few columns, so that the mean of a gradient is something; and a mean of the rows
        for n in (24, 600):
            shapes = [(5, n), (5, n), (n,), (n,)]
            inputs = [randn(*s).add_(2).requires_grad_() for s in shapes]
            rule(ops.residual_layer_norm, plain.residual_layer_norm, inputs)
        rule(
            lambda *x: ops.residual_layer_norm(*x, dropout_p=0.3),
            lambda x, *rest: plain.residual_layer_norm(
                x * elementwise(SEED, x, 0.3, x.dtype), *rest
            ),
            inputs,
        )
    finally:
        norm._rows_per_block, public.seed_for = before, seed_before


def float32_weight(rule: Rule) -> None:
    rule(
        ops.rms_norm,
        plain.rms_norm,
        [randn(3, 264, grad=True), randn(264, grad=True, dtype=torch.float32)],
    )
