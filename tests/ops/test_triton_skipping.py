"""The Triton loss reads no tile of tiny gradients: what is planted in those must not be seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import emulator
import pytest
import torch
from test_skipped_gradients import ROWS, VOCABULARY, check_bound, dlogits_of, head
from torch import Tensor

from fastvlm import ops
from fastvlm.ops.dispatch import OPS
from fastvlm.triton import configs
from fastvlm.triton.configs.products import tile

pytest.importorskip("triton")
from fastvlm.triton import loss

pytestmark = pytest.mark.triton

# tiles of the gradients of logits, and of the two sums that read them, from finer to coarser
GEOMETRIES = {
    "alike": ((16, 16, 16), (16, 16, 16), (16, 16, 16)),
    "sums-are-finer": ((32, 64, 16), (16, 16, 16), (16, 16, 16)),
    "sums-are-coarser": ((16, 16, 16), (32, 16, 32), (64, 16, 32)),
    "halves": ((16, 128, 16), (16, 16, 32), (32, 16, 16)),
}


@contextmanager
def small(geometry: str = "alike") -> Iterator[None]:
    """Several tiles of each kind, and several chunks of the vocabulary."""
    names = ("dlogits", "dh", "dweight")
    tiles = {
        f"linear_cross_entropy_{name}": tile(*blocks, 4, 2)
        for name, blocks in zip(names, GEOMETRIES[geometry])
    }
    before = loss.SCRATCH_BYTES, loss.FEWEST_COLUMNS, loss.COLUMNS
    loss.SCRATCH_BYTES, loss.FEWEST_COLUMNS, loss.COLUMNS = 0, 128, 128
    try:
        with emulator.emulated(), configs.replaced(**tiles):
            yield
    finally:
        loss.SCRATCH_BYTES, loss.FEWEST_COLUMNS, loss.COLUMNS = before


class Poisoned(loss._Backward):
    """Between the launches, NaN in all tiles of DLOGITS that are said not to count."""

    dead: list[Tensor]

    def chunk_dlogits(self, start: int, stop: int) -> None:
        super().chunk_dlogits(start, stop)
        assert self.live is not None
        dead = self.live[: -(-int(self.count) // self.tile[0])] == 0
        Poisoned.dead.append(dead)
        mask = dead.repeat_interleave(self.tile[0], 0).repeat_interleave(self.tile[1], 1)
        mask = mask[: self.rows]
        self.dlogits[: mask.shape[0], : mask.shape[1]][mask] = float("nan")


@contextmanager
def poisoned() -> Iterator[list[Tensor]]:
    """Gives the tiles that were poisoned, for each chunk."""
    before, loss._Backward = loss._Backward, Poisoned  # type: ignore[misc]
    Poisoned.dead = []
    try:
        yield Poisoned.dead
    finally:
        loss._Backward = before  # type: ignore[misc]


def blocks_of_tokens(h: Tensor) -> tuple[Tensor, Tensor]:
    """A weight and labels of which most blocks of tokens are far from every row."""
    weight = torch.randn(VOCABULARY, h.shape[1])
    # rows and tokens lie along one direction, most tokens on its other side
    h.data[:, 0] = 9.0
    weight[:, 0] = torch.where(torch.arange(VOCABULARY) % 160 < 40, 1.0, -1.0)
    labels = torch.randint(0, 40, (ROWS,)).masked_fill(torch.rand(ROWS) < 0.3, -100)
    labels[5] = 330
    return weight, labels


@pytest.mark.parametrize("cap", [0.0, 30.0], ids=["nocap", "cap"])
def test_what_is_planted_in_tiny_tiles_is_not_read(cap: float, randn: Any) -> None:
    """Both sums are, to the bit, those without the poison; and it is where it should be."""
    h = randn(ROWS, 24)
    weight, labels = blocks_of_tokens(h)
    weight = weight.to(h.dtype)
    skip = 2.0**-8
    arguments = torch.rand(ROWS) + 0.1, h, weight, labels, None
    with small():
        run = OPS["linear_cross_entropy"].kernels["triton"].run
        back = OPS["linear_cross_entropy_backward"].kernels["triton"].run
        _, lse = run(h, weight, labels, None, cap, -100)
        tail = lse, cap, -100, skip, [True, True, False]
        clean = back(*arguments, *tail)
        with poisoned() as dead:
            spoilt = back(*arguments, *tail)
    assert all(x.isfinite().all() for x in spoilt)
    assert all(torch.equal(a, b) for a, b in zip(clean, spoilt))
    # which tiles they are follows from the definition alone
    counts = labels >= 0
    d, own = dlogits_of(h, weight, labels, torch.ones(ROWS), None, cap)
    kept = ((d.abs() > skip) | own)[counts]
    blocks = kept.split(16, 0)
    want = torch.stack([torch.stack([x.any() for x in b.split(16, 1)]) for b in blocks])
    got = torch.cat(dead, 1)[:, : want.shape[1]]
    assert torch.equal(got, ~want)
    assert want.float().mean() < 0.5


def test_without_the_option_everything_is_read(randn: Any) -> None:
    """The poison is seen where the sums go over all tiles: the test above can fail."""
    h = randn(ROWS, 24)
    weight, labels = blocks_of_tokens(h)
    with small(), poisoned():
        back = OPS["linear_cross_entropy_backward"].kernels["triton"].run
        arguments = torch.ones(ROWS), h, weight.to(h.dtype), labels, None, torch.zeros(ROWS, 2)
        before, loss._Backward.steps = loss._Backward.steps, everything  # type: ignore[assignment]
        try:
            dh, dweight, _ = back(*arguments, 0.0, -100, 0.5, [True, True, False])
        finally:
            loss._Backward.steps = before
    assert dh[labels >= 0].isnan().any()
    assert dweight.isnan().any()


def everything(self: Any, config: Any, width: int, of_rows: bool) -> tuple[Tensor, Tensor]:
    """A list of all steps."""
    block, step = config.blocks["BLOCK_M"], config.blocks["BLOCK_K"]
    count = int(self.count)
    outer, inner = (self.rows, width) if of_rows else (width, count)
    steps = torch.arange(-(-inner // step), dtype=torch.int32)
    programs = -(-outer // block)
    lengths = torch.full((programs,), steps.numel(), dtype=torch.int32)
    if of_rows:
        lengths[-(-count // block) :] = 0
    return steps.repeat(programs, 1), lengths


@pytest.mark.parametrize("geometry", list(GEOMETRIES))
@pytest.mark.parametrize("kind", ["peaked", "mixed"])
def test_tiles_of_other_sizes(kind: str, geometry: str, randn: Any) -> None:
    h, weight, labels = head(kind, randn)
    with small(geometry):
        check_bound(ops.linear_cross_entropy, h, weight, labels, 0.01)  # type: ignore[arg-type]


def test_all_rows_ignored() -> None:
    h, weight = torch.randn(ROWS, 24), torch.randn(VOCABULARY, 24)
    labels, lse = torch.full((ROWS,), -100), torch.zeros(ROWS, 2)
    with small():
        back = OPS["linear_cross_entropy_backward"].kernels["triton"].run
        got = back(torch.ones(ROWS), h, weight, labels, None, lse, 0.0, -100, 0.01, [True] * 3)
    assert all((x == 0).all() for x in got)
