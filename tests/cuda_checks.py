"""Short checks of the CUDA kernels, one for each kind of work: what planted bugs must not pass."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import cuda_emulator
import plain
import torch

from fastvlm import Layout, ops
from fastvlm.cuda import attention, loss, mlp, norm
from fastvlm.ops import norm as public
from fastvlm.ops.attention import arguments_of
from fastvlm.reference import attention as reference
from fastvlm.reference._random import elementwise

Rule = Callable[..., None]
SEED = torch.tensor([12345])


def randn(*shape: int, grad: bool = False, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


@contextlib.contextmanager
def splits_of(floor: Any, count: int) -> Iterator[None]:
    """Inside, its launchers split what they can into so many parts."""
    before, floor._splits = floor._splits, lambda *args: count
    try:
        yield
    finally:
        floor._splits = before


def gated(x: torch.Tensor, residual: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    weight, gate, following = rest
    return ops.residual_rms_norm(x, residual, weight, gate=gate, next_weight=following)


def rms(rule: Rule) -> None:
    """Three warps, a tail in the last chunk, several rows to a block backward."""
    before, norm._rows_per_block = norm._rows_per_block, lambda x: 2
    try:
        for n, dtype in ((600, torch.bfloat16), (333, torch.float32)):
            inputs = [randn(*s, grad=True, dtype=dtype) for s in ((5, n), (5, n), (n,), (1,), (n,))]
            if dtype == torch.float32:
                gates = [*randn(2, 8, 3, n, dtype=dtype), inputs[2], randn(8, dtype=dtype)]
                inputs_of_each = [x.detach().requires_grad_() for x in (*gates, inputs[4])]
                rule(
                    plain.of_each_gate(gated),
                    plain.of_each_gate(plain.residual_rms_norm),
                    inputs_of_each,
                )
            else:
                rule(gated, plain.residual_rms_norm, inputs)
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
    layout = Layout.from_lengths(*lengths)
    for splits in (1, 2):
        with splits_of(attention, splits):
            for d in (64, 96):
                rows, keys = sum(lengths[0]), sum(lengths[1])
                rule(
                    lambda *x: ops.cross_attention(*x, layout, softcap=5.0),
                    lambda *x: plain.attention(*x, *lengths, softcap=5.0),
                    [randn(rows, 4, d), randn(keys, 2, d), randn(keys, 2, d)],
                )


def more_rows(rule: Rule) -> None:
    """Two tiles of rows to an image, and an image of nothing that is read; whole and split."""
    lengths = [9, 8, 2], [40, 0], [0, 0, 1]
    layout = Layout.from_lengths(*lengths)
    for splits in (1, 2):
        with splits_of(attention, splits):
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
    for splits in (1, 2):
        with splits_of(attention, splits):
            _, ours = torch.ops.fastvlm.cross_attention(*arguments)
            assert torch.allclose(ours, reference.attention(*arguments)[1], rtol=1e-5, atol=1e-5)


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


def few_rows(rule: Rule) -> None:
    """A tail of columns, of depth and of rows; more steps of depth than warps; whole and split.

    Of two splits the second has no depth at all where the depth is 40.
    """
    for count in (1, 2):
        with torch.no_grad(), splits_of(mlp, count):
            rule(
                lambda *x: ops.gelu_mlp(*x, approximate="none"),
                lambda *x: plain.gelu_mlp(*x, "none"),
                [randn(9, 304), randn(40, 304), randn(40), randn(13, 40), randn(13)],
            )
            rule(
                lambda *x: ops.geglu_mlp(*x),
                lambda *x: plain.geglu_mlp(*x, "tanh"),
                [randn(16, 304), randn(40, 304), randn(40, 304), randn(13, 40)],
            )


def int8_of(columns: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the factors of its rows."""
    weight = torch.randint(-128, 128, (columns, depth), dtype=torch.int8)
    return weight, (torch.rand(columns) + 0.1) / 64


def widened(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return weight.double() * scale.double()[:, None]


def int8(rule: Rule) -> None:
    (weight, scale), (up, up_scale) = int8_of(13, 144), int8_of(13, 144)
    for count in (1, 2):
        with torch.no_grad(), splits_of(mlp, count):
            rule(
                lambda x: ops.low_precision_linear(x, weight, scale),
                lambda x: x @ widened(weight, scale).to(x.dtype).t(),
                [randn(3, 144)],
            )
            rule(
                lambda x, count=count: torch.ops.fastvlm_cuda.few_rows_gated(
                    x, weight, up, scale, up_scale, 2, count
                ),
                lambda x: (
                    torch.nn.functional.gelu(
                        x @ widened(weight, scale).to(x.dtype).t(), approximate="tanh"
                    )
                    * (x @ widened(up, up_scale).to(x.dtype).t())
                ),
                [randn(9, 144, dtype=torch.bfloat16) / 4],
            )


def best_of(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).topk(k).values, logits.logsumexp(-1)


def topk(rule: Rule) -> None:
    """Three tiles of tokens, the last with a tail, in three blocks, two (of which the second has a
    tile less) and one; scores of either sign; ties."""
    before = loss._tiles
    try:
        for tiles in (1, 2, 3):
            loss._tiles = lambda *args, tiles=tiles: tiles
            _topk(rule)
    finally:
        loss._tiles = before


def _topk(rule: Rule) -> None:

    def plainly(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = torch.nn.functional.linear(h, w, b)
        return best_of(3 * torch.tanh(logits / 3), 5)

    def ours(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values, indices, lse = ops.linear_topk(h, w, 5, bias=b, softcap=3.0)
        logits = 3 * torch.tanh((h.double() @ w.double().t() + b.double()) / 3)
        assert (logits.log_softmax(-1).gather(1, indices) - values).abs().max() < 1e-4
        return values, lse

    with torch.no_grad():
        for rows in (3, 17):
            rule(ours, plainly, [randn(rows, 40), randn(150, 40), randn(150)])
        h, weight = randn(2, 40), randn(150, 40)
        weight[140] = weight[70] = weight[3]
        # more than a lane of a warp each
        values, indices, lse = ops.linear_topk(h, weight, 60)
        assert all(row.unique().numel() == 60 for row in indices)
        exact = (h.double() @ weight.double().t()).topk(60).values
        assert (values + lse.unsqueeze(1) - exact).abs().max() < 1e-4
        for place in (3, 40, 70, 104, 130, 149):
            # nothing else there is as good as the first tile
            first = torch.full((150,), -100.0)
            first[:64] = 0
            first[place] = 100
            assert (ops.linear_topk(h, weight, 5, bias=first.bfloat16())[1][:, 0] == place).all()
        # better than some of the second half of what is held, and than none of the first
        falling = torch.cat([torch.arange(64.0).flip(0), torch.full((86,), 10.5)])
        found = ops.linear_topk(h, weight * 0, 60, bias=falling.bfloat16())[1]
        assert (found == torch.cat([torch.arange(53), torch.arange(64, 71)])).all()
        _, indices, _ = ops.linear_topk(weight[3:4] * 4, weight, 5)
        places = [int((indices[0] == i).nonzero()) for i in (3, 70, 140)]
        assert places == sorted(places)
        # the last block gives all
        bias = torch.zeros(150)
        bias[128:] = 100
        assert (ops.linear_topk(h, weight, 5, bias=bias.bfloat16())[1] >= 128).all()
        bias[:64] = float("-inf")
        assert ops.linear_topk(h, weight, 5, bias=bias.bfloat16())[0].isfinite().all()


def other_kinds(rule: Rule) -> None:
    """float16, and heads of 128 and 256: what a planted bug's kernels are compiled without."""
    lengths, filled = ([3, 2], [70, 33], [1, 0]), [70, 33, 31, 1, 0]
    layout = Layout.from_lengths(*lengths)
    half = torch.float16
    for splits in (1, 2):
        with splits_of(attention, splits):
            for d, dtype in ((128, half), (256, half), (256, torch.bfloat16), (64, half)):
                q, cache = randn(5, 4, d, dtype=dtype), randn(5, 70, 2, d, dtype=dtype)
                keys = randn(103, 2, d, dtype=dtype)
                rule(
                    lambda *x: ops.cross_attention(*x, layout, softcap=5.0),
                    lambda *x: plain.attention(*x, *lengths, softcap=5.0),
                    [q, keys, keys.flip(0)],
                )
                rule(
                    lambda *x: ops.cached_attention(*x, torch.tensor(filled)),
                    lambda *x: plain.cached_attention(*x, filled),
                    [q, cache, cache.flip(0)],
                )
    with torch.no_grad(), splits_of(mlp, 2):
        shapes = (3, 304), (40, 304), (40, 304), (13, 40)
        rule(
            lambda *x: ops.geglu_mlp(*x),
            lambda *x: plain.geglu_mlp(*x, "tanh"),
            [randn(*shape, dtype=half) / 4 for shape in shapes],
        )
        rule(
            lambda h, w: ops.linear_topk(h, w, 5)[::2],
            lambda h, w: best_of(torch.nn.functional.linear(h, w), 5),
            [randn(17, 40, dtype=half), randn(150, 40, dtype=half)],
        )
    norms = [randn(*s, dtype=half, grad=True) for s in ((5, 600), (5, 600), (600,), (1,), (600,))]
    rule(gated, plain.residual_rms_norm, norms)
