"""Cross-attention of a decoding step: the beams of an image against its keys, once.

The baselines read what transformers gives them: keys and values copied for every beam. Making the
copies is not charged to them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import engines, gpu_baselines
from benchmarks.cases import ATTENTION
from benchmarks.kinds import AttentionCase
from benchmarks.measure import Function, Operands
from benchmarks.micro import each
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


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None) -> Tensor:
    """What transformers' eager attention of Gemma-2 computes, [batch, heads, rows, dim]."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def functions(case: AttentionCase, device: str = "cpu") -> dict[str, Function]:
    def ours(q: Tensor, k: Tensor, v: Tensor, layout: Layout, *_: Tensor) -> Tensor:
        return ops.cross_attention(q, k, v, layout, softcap=case.softcap)

    def sdpa(
        q: Tensor, k: Tensor, v: Tensor, layout: Layout, qc: Tensor, kc: Tensor, vc: Tensor
    ) -> Tensor:
        gqa = case.heads != case.kv_heads
        return F.scaled_dot_product_attention(qc, kc, vc, enable_gqa=gqa)[:, :, 0]

    def of_copies(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager(q, k, v, None, case.softcap)[:, :, 0]

    def by_hand(
        q: Tensor, k: Tensor, v: Tensor, layout: Layout, qc: Tensor, kc: Tensor, vc: Tensor
    ) -> Tensor:
        return of_copies(qc, kc, vc)

    # sdpa has no softcap: there transformers itself must take the eager path
    baseline = {"sdpa": sdpa} if case.softcap is None else {"eager": by_hand}
    if device == "cuda":
        packed = gpu_baselines.attention(False, case.head_dim**-0.5, case.softcap)
        baseline |= {name: _first_four(side) for name, side in packed.items()}
        baseline |= {n: _copies(side) for n, side in engines.compiled(of_copies).items()}
    return {**baseline, "fastvlm": ours}


def _first_four(side: Function) -> Function:
    return lambda *operands: side(*operands[:4])


def _copies(side: Function) -> Function:
    return lambda *operands: side(*operands[4:])


@each(ATTENTION)
def test_attention(
    run_case: Callable[..., None], case: AttentionCase, dtype: torch.dtype, device: str
) -> None:
    run_case(case, dtype, lambda: operands(case, dtype, device), functions(case, device))
