"""Launchers of the output head. None waits for the device: which rows count is decided there.

Rows with ignore_index are put last, in an order that is made on the device; programs beyond the
count of the others end at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm.triton import configs
from fastvlm.triton.common import (
    Launcher,
    cdiv,
    dense_last,
    device_of,
    dot_precision,
    next_power_of_2,
    unsupported_dtype,
)
from fastvlm.triton.configs import Config
from fastvlm.triton.kernels import loss as kernels
from fastvlm.triton.kernels import loss_backward as backward

MOST_K = 64
# its blocks must fit into the registers of the program that merges them
LARGEST_VOCABULARY = 2**19
# the gradients of a chunk's logits take this much memory, or SHARE_OF_WEIGHT of what the weight
# takes, or as much as FEWEST_COLUMNS do: each chunk reads h twice, and reads and writes the sums of
# dh, which are to cost little beside the products; every block size divides COLUMNS
SCRATCH_BYTES, SHARE_OF_WEIGHT, FEWEST_COLUMNS, COLUMNS = 64 * 2**20, 0.25, 2048, 256
# rows ranked at one time, however much memory the best of each block take: a decoding step
FEWEST_RANKED = 64
# row blocks that run over the same block of the vocabulary: their weight is read once
_BAND, _SMALL_BAND = 32, 8


def chunk_columns(rows: int, weight: Tensor) -> int:
    """Tokens whose gradients of logits exist at one time, a multiple of COLUMNS."""
    itemsize, (vocabulary, d) = weight.itemsize, weight.shape
    scratch = max(SCRATCH_BYTES, int(SHARE_OF_WEIGHT * vocabulary * d * itemsize))
    most = max(scratch // max(1, rows * itemsize), FEWEST_COLUMNS) // COLUMNS * COLUMNS
    # as many chunks as that takes, alike: of a short last one most of the scratch would be idle
    return cdiv(cdiv(vocabulary, cdiv(vocabulary, most)), COLUMNS) * COLUMNS


def _key(x: Tensor) -> dict[str, int]:
    """What the tables of configs decide by."""
    return {"rows": next_power_of_2(x.shape[0]), "wide": int(x.dtype == torch.float32)}


def _logits(x: Tensor, bias: Tensor | None, softcap: float, config: Config) -> dict[str, Any]:
    """Constants of the kernels that compute logits."""
    return {
        "HAS_BIAS": bias is not None,
        "CAP": softcap > 0,
        "EVEN": x.shape[1] % config.blocks["BLOCK_K"] == 0,
        "ACCURATE": x.dtype == torch.float32,
        "PRECISION": dot_precision(x),
        "GROUP": _BAND,
    }


def _float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _order(
    labels: Tensor, ignore_index: int, grad: Tensor | None, nll: Tensor | None, lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that count first, their count, and (backward) the unit of gradients of logits."""
    rows = labels.shape[0]
    order = labels.new_empty(rows, dtype=torch.int32)
    count, scale = labels.new_empty(1, dtype=torch.int32), _float32(labels, 1)
    kernels.order_rows[(1,)](
        labels, grad, order, count, scale, nll, lse, rows, ignore_index,
        BACKWARD=grad is not None, BLOCK=min(2048, next_power_of_2(rows)), num_warps=8,
    )  # fmt: skip
    return order, count, scale


def _cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    h, weight, labels = dense_last(h), dense_last(weight), labels.contiguous()
    bias = None if bias is None else bias.contiguous()
    (rows, d), vocabulary = h.shape, weight.shape[0]
    nll, lse = _float32(h, rows), _float32(h, rows, 2)
    if rows == 0:
        return nll, lse

    def run(config: Config) -> None:
        size = config.blocks
        blocks = cdiv(vocabulary, size["BLOCK_N"])
        largest, sums = _float32(h, blocks, rows), _float32(h, blocks, rows)
        picked = _float32(h, rows)
        kernels.cross_entropy_tiles[(cdiv(rows, size["BLOCK_M"]) * blocks,)](
            h, weight, bias, labels, order, count, largest, sums, picked,
            h.stride(0), weight.stride(0), rows, d, vocabulary, softcap,
            **_logits(h, bias, softcap, config), **config.arguments,
        )  # fmt: skip
        kernels.cross_entropy_combine[(cdiv(rows, 16),)](
            largest, sums, picked, labels, order, count, nll, lse, rows, blocks, vocabulary,
            BLOCK_M=16, BLOCK_N=64,
        )  # fmt: skip

    with device_of(h):
        order, count, _ = _order(labels, ignore_index, None, nll, lse)
        configs.launch("linear_cross_entropy", h, run, **_key(h))
    return nll, lse


class _Backward:
    """The tensors of one backward pass and the launches over a chunk of the vocabulary."""

    def __init__(
        self, h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, skip_below: float
    ):
        self.h, self.weight, self.bias, self.softcap = h, weight, bias, softcap
        # None, where nothing is skipped, is compiled away; a number would be an argument
        self.skip_below = skip_below or None
        self.live: Tensor | None = None
        (self.rows, self.d), self.vocabulary = h.shape, weight.shape[0]
        self.columns = chunk_columns(self.rows, weight)

    def prepare(self, grad: Tensor, labels: Tensor, lse: Tensor, ignore_index: int) -> None:
        self.grad, self.labels, self.lse = grad, labels, lse
        self.order, self.count, self.scale = _order(labels, ignore_index, grad, None, None)
        # every row, in order: the loops over rows then read neighbours
        self.x = self.h.index_select(0, self.order)
        self.dlogits = self.h.new_empty(self.rows, self.columns)

    def launch(self, kernel: str, run: Any) -> None:
        """Timing may run a kernel more than once, at the first chunk, which reads no sums."""
        configs.launch(f"linear_cross_entropy_{kernel}", self.h, run, **_key(self.h))

    def chunk_dlogits(self, start: int, stop: int) -> None:
        weight = self.weight[start:stop]
        bias = None if self.bias is None else self.bias[start:stop]
        padded = cdiv(stop - start, COLUMNS) * COLUMNS

        def run(config: Config) -> None:
            self.tile = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
            tiles = cdiv(self.rows, self.tile[0]), cdiv(padded, self.tile[1])
            if self.skip_below is not None:
                self.live = self.order.new_empty(tiles)
            backward.cross_entropy_dlogits[(tiles[0] * tiles[1],)](
                self.grad, self.x, weight, bias, self.labels, self.lse, self.order, self.count,
                self.scale, self.dlogits, self.live, weight.stride(0), self.columns, self.d, start,
                stop - start, padded, self.softcap, self.skip_below,
                **_logits(self.h, bias, self.softcap, config), SKIP=self.live is not None,
                **config.arguments,
            )  # fmt: skip

        self.launch("dlogits", run)

    def steps(self, config: Config, width: int, of_rows: bool) -> tuple[Tensor | None, ...]:
        """The lists of steps for the programs of dh (of_rows) or dweight; None: all of them."""
        if self.live is None:
            return None, None
        block, step = config.blocks["BLOCK_M"], config.blocks["BLOCK_K"]
        outer, inner = (self.rows, width) if of_rows else (width, self.rows)
        most = cdiv(inner, step)
        lists = self.order.new_empty(cdiv(outer, block), most)
        lengths = self.order.new_empty(cdiv(outer, block))
        backward.live_steps[(cdiv(outer, block),)](
            self.live, lists, lengths, self.count, width, cdiv(width, COLUMNS) * COLUMNS,
            OF_ROWS=of_rows, TILE_M=self.tile[0], TILE_N=self.tile[1], BLOCK=block, STEP=step,
            TOGETHER=min(128, next_power_of_2(most)), num_warps=1,
        )  # fmt: skip
        return lists, lengths

    def chunk_dh(self, start: int, stop: int, sums: Tensor, dh: Tensor) -> None:
        weight, width = self.weight[start:stop], stop - start

        def run(config: Config) -> None:
            size = config.blocks
            tiles = cdiv(self.rows, size["BLOCK_M"]) * cdiv(self.d, size["BLOCK_N"])
            backward.cross_entropy_dh[(tiles,)](
                self.dlogits, weight, sums, dh, self.order, self.count, self.scale,
                *self.steps(config, width, True), self.columns, weight.stride(0), self.rows,
                self.d, width, int(start == 0), int(stop == self.vocabulary),
                EVEN_N=self.d % size["BLOCK_N"] == 0, EVEN_K=width % size["BLOCK_K"] == 0,
                PRECISION=dot_precision(self.h), GROUP=_SMALL_BAND,
                ACCURATE=self.h.dtype == torch.float32, SKIP=self.live is not None,
                **config.arguments,
            )  # fmt: skip

        self.launch("dh", run)

    def chunk_dweight(self, start: int, stop: int, dweight: Tensor) -> None:
        width = stop - start

        def run(config: Config) -> None:
            size = config.blocks
            tiles = cdiv(width, size["BLOCK_M"]) * cdiv(self.d, size["BLOCK_N"])
            backward.cross_entropy_dweight[(tiles,)](
                self.dlogits, self.x, dweight[start:stop], self.count, self.scale,
                *self.steps(config, width, False), self.columns, self.d, width,
                EVEN_N=self.d % size["BLOCK_N"] == 0, PRECISION=dot_precision(self.h),
                GROUP=_SMALL_BAND, SKIP=self.live is not None, **config.arguments,
            )  # fmt: skip

        self.launch("dweight", run)

    def chunk_dbias(self, start: int, stop: int, dbias: Tensor) -> None:
        backward.cross_entropy_dbias[(cdiv(stop - start, 64),)](
            self.dlogits, dbias[start:stop], self.count, self.scale, self.columns, stop - start,
            BLOCK_M=32, BLOCK_N=64,
        )  # fmt: skip


def _cross_entropy_backward(
    grad_nll: Tensor,
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    softcap: float,
    ignore_index: int,
    skip_below: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    need_h, need_w, need_b = needs[0], needs[1], needs[2] and bias is not None
    h, weight = dense_last(h), dense_last(weight)
    bias = None if bias is None else bias.contiguous()
    if h.shape[0] == 0 or weight.shape[0] == 0:
        shapes = h.shape if need_h else (0,), weight.shape if need_w else (0,)
        return (
            h.new_zeros(shapes[0]),
            h.new_zeros(shapes[1]),
            h.new_zeros(weight.shape[0] if need_b else 0),
        )
    dh = h.new_empty(h.shape if need_h else (0,))
    dweight = h.new_empty(weight.shape if need_w else (0,))
    dbias = h.new_empty(weight.shape[0] if need_b else 0)
    if not (need_h or need_w or need_b):
        return dh, dweight, dbias
    work = _Backward(h, weight, bias, softcap, skip_below)
    # float32 sums need no room of their own beside a float32 dh
    sums = dh
    if need_h and h.dtype != torch.float32 and work.columns < work.vocabulary:
        sums = _float32(h, *h.shape)
    with device_of(h):
        work.prepare(grad_nll.contiguous(), labels.contiguous(), lse.contiguous(), ignore_index)
        for start in range(0, work.vocabulary, work.columns):
            chunk = start, min(start + work.columns, work.vocabulary)
            work.chunk_dlogits(*chunk)
            if need_h and dh.numel():
                work.chunk_dh(*chunk, sums, dh)
            if need_w and dweight.numel():
                work.chunk_dweight(*chunk, dweight)
            if need_b:
                work.chunk_dbias(*chunk, dbias)
    return dh, dweight, dbias


def _topk(
    h: Tensor, weight: Tensor, k: int, bias: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    h, weight = dense_last(h), dense_last(weight)
    bias = None if bias is None else bias.contiguous()
    (rows, d), vocabulary = h.shape, weight.shape[0]
    values, lse = _float32(h, rows, k), _float32(h, rows)
    indices = h.new_empty((rows, k), dtype=torch.int64)
    if rows == 0:
        return values, indices, lse

    def run(config: Config) -> None:
        size = config.blocks
        blocks = cdiv(vocabulary, size["BLOCK_N"])
        kept, heads = min(k, size["BLOCK_N"]), next_power_of_2(blocks)
        slab = min(rows, max(FEWEST_RANKED, SCRATCH_BYTES // (8 * blocks * kept)))
        largest, sums = _float32(h, slab, blocks), _float32(h, slab, blocks)
        keys = h.new_empty((slab, blocks, kept), dtype=torch.int64)
        for start in range(0, rows, slab):
            part = slice(start, min(start + slab, rows))
            x, count = h[part], part.stop - start
            kernels.topk_tiles[(cdiv(count, size["BLOCK_M"]) * blocks,)](
                x, weight, bias, largest, sums, keys, h.stride(0), weight.stride(0),
                count, d, vocabulary, softcap, kept,
                **_logits(h, bias, softcap, config), **config.arguments,
            )  # fmt: skip
            kernels.topk_merge[(count,)](
                largest, sums, keys, values[part], indices[part], lse[part], blocks, kept, k,
                BLOCK=heads, num_warps=min(16, max(1, heads // 256)),
            )  # fmt: skip

    with device_of(h):
        configs.launch("linear_topk", h, run, **_key(h))
    return values, indices, lse


def _unsupported_topk(h: Tensor, weight: Tensor, k: int, *rest: Any) -> str | None:
    if k > MOST_K:
        return f"k of {k} (it has up to {MOST_K})"
    if weight.shape[0] > LARGEST_VOCABULARY:
        return f"a vocabulary of {weight.shape[0]} (it has up to {LARGEST_VOCABULARY})"
    return unsupported_dtype(h, weight)


LAUNCHERS = {
    "linear_cross_entropy": Launcher(_cross_entropy),
    "linear_cross_entropy_backward": Launcher(_cross_entropy_backward),
    "linear_topk": Launcher(_topk, _unsupported_topk),
}
