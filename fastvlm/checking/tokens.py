"""Where generated tokens differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """The first one between two [rows, length] of tokens: at row and place, or in their shapes."""

    row: int
    place: int
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def first_difference(ours: Tensor, theirs: Tensor) -> Difference | None:
    if ours.shape != theirs.shape:
        return Difference(0, 0, (tuple(ours.shape), tuple(theirs.shape)))
    places = (ours != theirs).nonzero()
    return Difference(*places[0].tolist()) if len(places) else None


def alike(ours: Tensor, theirs: Tensor, fill: int) -> dict[int, int]:
    """Of [rows, lengths] of tokens: the place of the first difference of each row that has one.

    fill: what stands behind the end of a row.
    """
    if ours.shape[0] != theirs.shape[0]:
        return dict.fromkeys(range(max(ours.shape[0], theirs.shape[0])), 0)
    length = max(ours.shape[1], theirs.shape[1])
    a, b = (F.pad(t, (0, length - t.shape[1]), value=fill) for t in (ours, theirs))
    same = (a == b).long().cumprod(1).sum(1).tolist()
    return {row: n for row, n in enumerate(same) if n < length}


def rows_in_words(differ: dict[int, int]) -> str:
    first = next(iter(differ))
    others = f", and {len(differ) - 1} more rows" if len(differ) > 1 else ""
    return f"row {first} differs from token {differ[first]} on{others}"
