"""Attention over packed captions, forward and backward, against the same captions padded.

The baselines get their tensors padded, and the keys and values of an image copied for each of its
captions: neither the padding nor the copying is charged to them, nor is summing the gradients of
the copies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import engines, gpu_baselines
from benchmarks.cases import CAPTIONS_ATTENTION
from benchmarks.kinds import CaptionsCase
from benchmarks.measure import Function, Operands, trained
from benchmarks.micro import each
from benchmarks.micro.test_attention import eager
from fastvlm import Layout, ops

Q, K, V = 0, 1, 2


def _layout(case: CaptionsCase) -> Layout:
    if case.keys is None:
        return Layout.from_lengths(case.lengths)
    image_of = [number // case.captions for number in range(len(case.lengths))]
    return Layout.from_lengths(case.lengths, [case.keys] * case.images, image_of)


def _tokens(case: CaptionsCase) -> Tensor:
    """bool [captions, longest]."""
    return torch.arange(max(case.lengths)) < torch.tensor(case.lengths)[:, None]


def _padded(case: CaptionsCase, x: Tensor) -> Tensor:
    """[tokens, heads, dim] -> [captions, heads, longest, dim], zeros behind each caption."""
    grid = x.new_zeros(len(case.lengths), max(case.lengths), *x.shape[1:])
    grid[_tokens(case).to(x.device)] = x
    return grid.transpose(1, 2).contiguous()


def _mask(case: CaptionsCase, dtype: torch.dtype, device: str) -> Tensor | None:
    """Added to the scores: causal, and no key of the padding. Every key of an image is a token."""
    if case.keys is not None:
        return None
    longest = max(case.lengths)
    seen = torch.ones(longest, longest, dtype=torch.bool).tril() & _tokens(case)[:, None, None]
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask.to(device)


def operands(case: CaptionsCase, dtype: torch.dtype, device: str) -> Operands:
    """For ours and for the baseline: q, k, v, layout or mask, gradient of the output."""

    def random(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, case.head_dim, dtype=dtype, device=device)

    q, grad = (random(case.rows, case.heads) for _ in range(2))
    kv_rows = case.rows if case.keys is None else case.images * case.keys
    k, v = (random(kv_rows, case.kv_heads) for _ in range(2))

    def keys_of_captions(x: Tensor) -> Tensor:
        if case.keys is None:
            return _padded(case, x)
        per_image = x.view(case.images, case.keys, case.kv_heads, case.head_dim).transpose(1, 2)
        return per_image.repeat_interleave(case.captions, 0).contiguous()

    theirs = (
        _padded(case, q), keys_of_captions(k), keys_of_captions(v), _mask(case, dtype, device),
        _padded(case, grad),
    )  # fmt: skip
    return (q, k, v, _layout(case).to(device), grad), theirs


def functions(case: CaptionsCase, device: str = "cpu") -> dict[str, Function]:
    op = ops.self_attention if case.keys is None else ops.cross_attention

    def packed(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        result: Tensor = op(q, k, v, layout, softcap=case.softcap)
        return result

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        gqa = case.heads != case.kv_heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)

    def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return eager(q, k, v, mask, case.softcap)

    ours = trained(packed, (Q, K, V))
    name, padded = ("sdpa", sdpa) if case.softcap is None else ("eager", by_hand)
    padded_sides = {name: padded, **(engines.compiled(padded) if device == "cuda" else {})}
    return {
        **{n: _of_other(trained(side, (Q, K, V))) for n, side in padded_sides.items()},
        **{n: _of_mine(trained(side, (Q, K, V))) for n, side in _on_gpu(case, device).items()},
        "fastvlm": lambda mine, other: ours(*mine),
    }


def _of_mine(side: Function) -> Function:
    return lambda mine, other: side(*mine)


def _of_other(side: Function) -> Function:
    return lambda mine, other: side(*other)


def _on_gpu(case: CaptionsCase, device: str) -> dict[str, Function]:
    """The libraries that take packed rows as ours does."""
    if device != "cuda":
        return {}
    return gpu_baselines.attention(case.keys is None, case.head_dim**-0.5, case.softcap)


def packed_results(case: CaptionsCase) -> Function:
    """The baseline's output and gradients as ours has them."""

    def packed(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[_tokens(case).to(x.device)]

    def of_images(x: Tensor) -> Tensor:
        if case.keys is None:
            return packed(x)
        return x.unflatten(0, (case.images, case.captions)).sum(1).transpose(1, 2).flatten(0, 1)

    return lambda result: (
        packed(result[0]), packed(result[1]), of_images(result[2]), of_images(result[3])
    )  # fmt: skip


@each(CAPTIONS_ATTENTION)
def test_attention_training(
    run_case: Callable[..., None], case: CaptionsCase, dtype: torch.dtype, device: str
) -> None:
    sides = functions(case, device)
    padded = ("sdpa", "eager", "torch.compile")
    comparable = {name: packed_results(case) for name in sides if name in padded}
    run_case(case, dtype, lambda: operands(case, dtype, device), sides, comparable)
