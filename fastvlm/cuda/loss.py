"""Launcher of csrc/cuda/loss.cu: linear_topk of a decoding step, up to 64 rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm.cuda.mlp import misfit
from fastvlm.triton.common import Launcher, cdiv, dense_last, multiprocessors

# kMostRankedRows and kLargestVocabulary of csrc/cuda/loss.h
MOST_ROWS, LARGEST_VOCABULARY = 64, 2**19
# each costs a round of the merge
MOST_K = 64
# tokens of a tile (kTileTokens there), and blocks of up to 16 rows that a multiprocessor holds at
# once; of more rows it holds two or three, and the last ones wait
TILE, RESIDENT = 64, 4


def _tiles(h: Tensor, vocabulary: int) -> int:
    """Tiles of tokens that a block goes through: as few blocks as the chip holds at once, so that
    little is left to merge."""
    return max(1, cdiv(cdiv(vocabulary, TILE), RESIDENT * multiprocessors(h)))


def _linear_topk(
    h: Tensor, weight: Tensor, k: int, bias: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    if bias is not None and bias.dtype not in (torch.float32, h.dtype):
        bias = bias.float()
    return torch.ops.fastvlm_cuda.linear_topk(
        dense_last(h), dense_last(weight), k, None if bias is None else dense_last(bias), softcap,
        _tiles(h, weight.shape[0]),
    )  # fmt: skip


def _unsupported(
    h: Tensor, weight: Tensor, k: int, bias: Tensor | None, softcap: float
) -> str | None:
    if k > MOST_K:
        return f"k of {k} (it has up to {MOST_K})"
    if weight.shape[0] > LARGEST_VOCABULARY:
        return f"a vocabulary of {weight.shape[0]} (it has up to {LARGEST_VOCABULARY})"
    return misfit(h, MOST_ROWS, weight=weight)


LAUNCHERS = {"linear_topk": Launcher(_linear_topk, _unsupported)}
