"""Short checks of the CUDA kernels, one for each kind of work: what planted bugs must not pass."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import cuda_emulator
import plain
import torch

from fastvlm import Layout, ops
from fastvlm.cuda import attention, norm
from fastvlm.ops import norm as public
from fastvlm.ops.attention import arguments_of
from fastvlm.reference import attention as reference
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


def cross(rule: Rule) -> None:
    """Readers out of order, groups of heads, keys around a tile; whole and in two splits."""
    lengths = [3, 2, 4, 1, 4], [0, 131, 64, 7], [1, 2, 1, 3, 1]
    layout, before = Layout.from_lengths(*lengths), attention._splits
    try:
        for splits in (1, 2):
            attention._splits = lambda *args, splits=splits: splits
            for d in (64, 96):
                rows, keys = sum(lengths[0]), sum(lengths[1])
                rule(
                    lambda *x: ops.cross_attention(*x, layout, softcap=5.0),
                    lambda *x: plain.attention(*x, *lengths, softcap=5.0),
                    [randn(rows, 4, d), randn(keys, 2, d), randn(keys, 2, d)],
                )
    finally:
        attention._splits = before


def more_rows(rule: Rule) -> None:
    """Two tiles of rows to an image, and an image of nothing that is read."""
    lengths = [9, 8, 2], [40, 0], [0, 0, 1]
    layout = Layout.from_lengths(*lengths)
    rule(
        lambda *x: ops.cross_attention(*x, layout),
        lambda *x: plain.attention(*x, *lengths),
        [randn(19, 2, 64), randn(40, 2, 64), randn(40, 2, 64)],
    )


def banks(rule: Rule) -> None:
    cuda_emulator.reset_counts()
    for d in (64, 96):
        q, k = randn(2, 1, d), randn(70, 1, d)
        ops.cross_attention(q, k, k, Layout.from_lengths([2], [70], [0]))
    assert cuda_emulator.counts()["bank_conflicts"] == 0


def stats(rule: Rule) -> None:
    layout = Layout.from_lengths([1, 2], [0, 90])
    q, k, v = randn(3, 2, 64), randn(90, 1, 64), randn(90, 1, 64)
    arguments = (q, k, v, *arguments_of(layout), False, 0, 0.125, 3.0, 0.0)
    before = attention._splits
    try:
        for splits in (1, 2):
            attention._splits = lambda *args, splits=splits: splits
            _, ours = torch.ops.fastvlm.cross_attention(*arguments)
            assert torch.allclose(ours, reference.attention(*arguments)[1], rtol=1e-5, atol=1e-5)
    finally:
        attention._splits = before


def cached(rule: Rule) -> None:
    """Holes and NaN in the cache, a window, more heads to a group than a tile has rows."""
    filled, time = [0, 1, 64, 70, 90], 90
    table = torch.randint(0, 6, (5, time), dtype=torch.int32)
    table[:, 3::7] = -1
    for group, window in ((2, None), (20, 9)):
        settings = {"window": window, "softcap": 5.0}
        rule(
            lambda *x, s=settings: ops.cached_attention(
                *x, torch.tensor(filled), ancestry=table, **s
            ),
            lambda *x, s=settings: plain.cached_attention(*x, filled, table, **s),
            [randn(5, 2 * group, 64), randn(6, time, 2, 64), randn(6, time, 2, 64)],
        )
    rule(
        lambda *x: ops.cached_attention(*x, torch.tensor(filled)),
        lambda *x: plain.cached_attention(*x, filled),
        [randn(5, 2, 64), randn(6, time, 2, 64), randn(6, time, 2, 64)],
    )


def far(rule: Rule) -> None:
    """Cache rows 2^30 elements apart, in a file with holes."""
    with tempfile.NamedTemporaryFile() as file:
        size = 2**31 + 16 + 5 * 64
        store = torch.from_file(file.name, shared=True, size=size, dtype=torch.bfloat16)
        cache = store.as_strided((3, 5, 1, 64), (2**30 + 8, 64, 64, 1))
        cache.copy_(torch.randn(3, 5, 1, 64))
        q, lengths, near = randn(3, 1, 64), torch.full((3,), 5), cache.contiguous()
        ours = ops.cached_attention(q, cache, cache, lengths)
        assert torch.equal(ours, ops.cached_attention(q, near, near, lengths))


def hidden(rule: Rule) -> None:
    q, cache = randn(1, 2, 64), randn(1, 80, 1, 64)
    table = torch.zeros(1, 80, dtype=torch.int32)
    table[:, 3] = -1
    cache[0, 70:] = float("nan")
    cache[0, 3] = float("nan")
    for ancestry in (table, None):
        out = ops.cached_attention(q, cache, cache, torch.tensor([3]), ancestry=ancestry)
        assert out.isfinite().all()
    out = ops.cached_attention(q, cache, cache, torch.tensor([70]), ancestry=table)
    assert out.isfinite().all()
