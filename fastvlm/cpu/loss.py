"""Launchers of csrc/cpu/loss.cpp: the head in blocks of the vocabulary.

A block's logits come from a product (`gemm`), stay in cache for the passes over them, and make room
for the next block's. They are float32 whatever the dtype of h and weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastvlm.cpu import bf16
from fastvlm.cpu.common import dense_bias, unavailable, wrong_dtype
from fastvlm.cpu.gemm import MAX_ROWS, added_product, few_rows, in_tiles, may_pack, product
from fastvlm.ops.dispatch import Kernel

# of a block of logits: what stays in a last-level cache, in few enough blocks for Python to call
_ELEMENTS = 2**21
_FEWEST, _MOST = 256, 8192
# where a block needs no copy of its weight, so few rows that a whole vocabulary is one
_MOST_STREAMED = 65536
# where the depth of a product is a block, rows of it for every thread are to stay in a second-level
# cache
_MOST_IN_TILES = 2048
# tokens of a block that count, above which its products are those of the whole block
_MOST_LIVE = 0.75
# a ranking is kept in order by insertion
_MAX_K = 256


class _Blocks:
    """The blocks of a head for some rows: their logits, float32, before bias and cap."""

    def __init__(self, rows: Tensor, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, dense_bias(bias)
        # in 16 bits the other way begins with a float32 copy of the weight, which costs more
        streams = few_rows(rows) if rows.dtype == torch.float32 else rows.shape[0] <= MAX_ROWS
        self.streams = streams and weight.stride(-1) == 1
        # tiles round what they read, bfloat16 is what it is: rows and weight are, logits are not
        self.in_tiles = not self.streams and in_tiles(rows) and may_pack()
        self.rows = rows.contiguous() if self.streams else rows.float()
        most = _MOST_STREAMED if self.streams else _MOST_IN_TILES if self.in_tiles else _MOST
        most = min(most, _ELEMENTS // max(1, rows.shape[0]))
        self.size = max(_FEWEST, most // 64 * 64)

    def product(self, x: Tensor, w: Tensor, total: Tensor | None = None) -> Tensor:
        """total + x w^T. Without a total it has the dtype of x, which tiles round to bfloat16."""
        if self.in_tiles:
            return bf16.bf16_linear(x, w, None, None, total, None)
        return product(x, w) if total is None else added_product(total, x, w)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor]]:
        """(columns, weight of the block, bias of the block, logits). Where the rows neither stream
        the weight nor meet it in tiles it is float32: what comes after the logits multiplies with
        it too."""
        for first in range(0, self.weight.shape[0], self.size):
            columns = slice(first, first + self.size)
            w = self.weight[columns]
            if self.streams:
                logits = torch.ops.fastvlm_cpu.linear(self.rows, w, None, True)
            else:
                w = w if self.in_tiles else w.float()
                logits = self.product(self.rows, w).contiguous()
            yield columns, w, None if self.bias is None else self.bias[columns], logits


def _running(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit and sum of exp(logit - largest) of rows that have seen nothing."""
    largest = x.new_full((x.shape[0],), float("-inf"), dtype=torch.float32)
    return largest, x.new_zeros(x.shape[0], dtype=torch.float64)


def _counted(h: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows count, those rows, and their labels."""
    rows = (labels != ignore_index).nonzero().flatten()
    return rows, h[rows], labels[rows]


def _linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    rows, x, target = _counted(h, labels, ignore_index)
    largest, total = _running(x)
    picked = torch.zeros_like(largest)
    for columns, _, b, logits in _Blocks(x, weight, bias):
        torch.ops.fastvlm_cpu.scan_logits(
            logits, b, softcap, columns.start, largest, total, target, picked, None, None
        )
    parts = torch.stack((largest, total.log().float()), 1)
    outside = (target < 0) | (target >= weight.shape[0])
    parts.masked_fill_(outside.unsqueeze(1), float("nan"))  # and with them the gradients
    nll = h.new_zeros(h.shape[0], dtype=torch.float32)
    lse = h.new_zeros(h.shape[0], 2, dtype=torch.float32)
    nll[rows] = parts[:, 1] - (picked - parts[:, 0])
    lse[rows] = parts
    return nll, lse


def _live_columns(d: Tensor, grad: Tensor, label: Tensor, skip_below: float) -> Tensor | None:
    """The tokens of a block that are not tiny for every row, or None where leaving out the others
    would not pay for copying these. label: counted from the first token of the block.
    """
    live = ((d.abs() <= skip_below * grad.abs().unsqueeze(1)) == 0).any(0)
    live[label[(label >= 0) & (label < d.shape[1])]] = True
    found = live.nonzero().flatten()
    return found if found.numel() <= _MOST_LIVE * d.shape[1] else None


def _linear_cross_entropy_backward(
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
    rows, x, target = _counted(h, labels, ignore_index)
    parts, grad = lse[rows], grad_nll[rows]
    wide = x.float()
    dx = torch.zeros_like(wide)
    dw = weight.new_empty(weight.shape if needs[1] else 0)
    db = bias.new_empty(bias.shape) if needs[2] and bias is not None else h.new_empty(0)
    blocks = _Blocks(x, weight, bias)
    for columns, w, b, d in blocks:
        torch.ops.fastvlm_cpu.logits_gradient(d, b, softcap, columns.start, target, parts, grad)
        if needs[2] and bias is not None:
            db[columns] = d.sum(0)
        live = None
        if skip_below > 0:
            live = _live_columns(d, grad, target - columns.start, skip_below)
        if live is not None:
            d, w = d[:, live], w[live]
        if blocks.in_tiles:
            d = d.to(x.dtype)  # as it would be read twice
        if needs[0]:
            dx = blocks.product(d, w.t() if blocks.in_tiles else w.float().t(), dx)
        if needs[1]:
            of_tokens = blocks.product(d.t(), wide.t())
            if live is None:
                dw[columns] = of_tokens
            else:
                dw[columns] = 0
                dw[columns.start + live] = of_tokens.to(dw.dtype)
    dh = h.new_empty(0)
    if needs[0]:
        dh = h.new_zeros(h.shape)
        dh[rows] = dx.to(h.dtype)
    return dh, dw, db


def _linear_topk(
    h: Tensor, weight: Tensor, k: int, bias: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = ((columns.start, b, logits) for columns, _, b, logits in _Blocks(h, weight, bias))
    return _ranked(h, blocks, k, softcap)


def topk_of_logits(
    logits: Tensor, k: int, bias: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `linear_topk` gives of a head that computes its logits [T, V] by itself.

    logits: float32, before bias [V] and cap (0: none); they are written into. Needs the kernels.
    """
    return _ranked(logits, [(0, dense_bias(bias), logits.contiguous())], k, softcap)


def _ranked(
    rows: Tensor, blocks: Iterable[tuple[int, Tensor | None, Tensor]], k: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """blocks: the first token, bias and logits of each."""
    largest, total = _running(rows)
    values = rows.new_empty(rows.shape[0], k, dtype=torch.float32)
    indices = rows.new_empty(rows.shape[0], k, dtype=torch.int64)
    for first, bias, logits in blocks:
        torch.ops.fastvlm_cpu.scan_logits(
            logits, bias, softcap, first, largest, total, None, None, values, indices
        )
    rest = total.log().float()
    values = (values - largest.unsqueeze(1)) - rest.unsqueeze(1)
    return values, indices, largest + rest


def _topk_unsupported(h: Tensor, weight: Tensor, k: int, *rest: Any) -> str | None:
    if k > _MAX_K:
        return f"k = {k}: it ranks up to {_MAX_K}"
    return wrong_dtype(h)


KERNELS = {
    "linear_cross_entropy": Kernel(
        "cpu", _linear_cross_entropy, unavailable, lambda h, *rest: wrong_dtype(h)
    ),
    "linear_cross_entropy_backward": Kernel(
        "cpu", _linear_cross_entropy_backward, unavailable, lambda g, h, *rest: wrong_dtype(h)
    ),
    "linear_topk": Kernel("cpu", _linear_topk, unavailable, _topk_unsupported),
}
