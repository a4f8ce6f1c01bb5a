"""Cross-attention of a decoding step: the beams of an image against its keys, once.

The baselines read what transformers gives them: keys and values copied for every beam. Making the
copies is not charged to them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import ATTENTION, AttentionCase
from benchmarks.measure import Operands
from fastvlm import Layout, ops


def operands(case: AttentionCase, dtype: torch.dtype, device: str) -> Operands:
    q = torch.randn(case.rows, case.heads, case.head_dim, dtype=dtype, device=device)
    shape = (case.images * case.keys, case.kv_heads, case.head_dim)
    k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    layout = Layout.for_beams(case.images, case.beams, [case.keys] * case.images).to(device)

    def copied(x: Tensor) -> Tensor:
        """[rows, heads, keys, dim], as transformers' cache holds it."""
        per_image = x.view(case.images, case.keys, case.kv_heads, case.head_dim).transpose(1, 2)
        return per_image.repeat_interleave(case.beams, 0).contiguous()

    return q, k, v, layout, q[:, :, None], copied(k), copied(v)


def functions(case: AttentionCase) -> dict[str, Callable[..., Tensor]]:
    groups = case.heads // case.kv_heads

    def ours(q: Tensor, k: Tensor, v: Tensor, layout: Layout, *_: Tensor) -> Tensor:
        return ops.cross_attention(q, k, v, layout, softcap=case.softcap)

    def sdpa(
        q: Tensor, k: Tensor, v: Tensor, layout: Layout, qc: Tensor, kc: Tensor, vc: Tensor
    ) -> Tensor:
        return F.scaled_dot_product_attention(qc, kc, vc, enable_gqa=groups > 1)[:, :, 0]

    def eager(
        q: Tensor, k: Tensor, v: Tensor, layout: Layout, qc: Tensor, kc: Tensor, vc: Tensor
    ) -> Tensor:
        kc, vc = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (kc, vc))
        scores = qc @ kc.transpose(2, 3) * case.head_dim**-0.5
        if case.softcap is not None:
            scores = torch.tanh(scores / case.softcap) * case.softcap
        return (scores.softmax(-1, dtype=torch.float32).to(qc.dtype) @ vc)[:, :, 0]

    # sdpa has no softcap: there transformers itself must take the eager path
    baseline = {"sdpa": sdpa} if case.softcap is None else {"eager": eager}
    return {**baseline, "fastvlm": ours}


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention(
    run_case: Callable[..., None], case: AttentionCase, dtype: torch.dtype, device: str
) -> None:
    run_case(case, lambda: operands(case, dtype, device), functions(case))
