"""Who brings images to a decoding loop that runs, and takes what was found about them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


class CannotJoin(RuntimeError):
    """Images cannot come into a decoding loop of this model as it is called; the text says why."""


@dataclass(frozen=True)
class Asked:
    """A search that joins: whose it is (tag), the tokens that its rows begin with, and the
    encoder's row that they read."""

    tag: Any
    begun: tuple[int, ...]
    row: int


@dataclass(frozen=True)
class Arrival:
    """What an encoder made of images, and what is asked about it.

    states [N, E, d], mask int64 [N, E], input_ids int64 [N, E]: as of `decoding.encode.Encoded`.
    """

    states: Tensor
    mask: Tensor
    input_ids: Tensor
    asked: tuple[Asked, ...]

    def split(self) -> tuple[Arrival, Arrival | None]:
        """The first search with the row that it reads, and the others; None: there are none."""
        rest = self.asked[1:]
        return self._only(self.asked[:1]), self._only(rest) if rest else None

    def _only(self, asked: tuple[Asked, ...]) -> Arrival:
        rows = sorted({one.row for one in asked})
        asked = tuple(replace(one, row=rows.index(one.row)) for one in asked)
        index = torch.tensor(rows, device=self.states.device)
        states, mask = self.states.index_select(0, index), self.mask.index_select(0, index)
        return Arrival(states, mask, self.input_ids.index_select(0, index), asked)


class Feed(Protocol):
    """Asked between the steps of a loop, by the thread that runs it."""

    def wants(self, tag: Any) -> bool:
        """Whether somebody still waits for what this search finds."""

    def done(self, tag: Any, found: list[tuple[list[int], float]]) -> None:
        """What it found, best first: new tokens, and their score, of a greedy search the sum of
        log-probabilities."""

    def take(self, searches: int) -> Arrival | None:
        """What comes to the searches that are there; None: nothing now."""
