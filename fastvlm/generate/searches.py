"""Searches that a decoding loop runs side by side: of beams, or greedy, each by itself.

A search knows its own rows, what is banned of them and what it has found. It may come into a loop
and leave it between any two steps: nothing of it depends on who else is there.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from fastvlm.generate.bans import Bans

# what transformers adds to the score of what may not be chosen
_FAR = -1.0e9


@dataclass
class Sentence:
    """A place among the best that have ended. beams: the row that each new token was written in."""

    score: float
    tokens: list[int]
    beams: list[int]
    ended: bool = False


class Candidate(NamedTuple):
    """A beam and a token after it. value: summed log-probabilities (of a greedy search the
    token's alone); ranked: by their length; hoped: by the length that the rest of the search hopes
    for."""

    beam: int
    token: int
    value: float
    ranked: float
    hoped: float


class Search:
    """What every search has.

    number: among those of the loop. rows: the tokens of each, of one length; begun: those that
    they began with. later: how many more these are than the loop's first search began with.
    fed: how many of the tokens the cache holds, all of them where the next are to be chosen.
    parents: from which of the rows those of now go on. tag, source: whose it is, and which keys and
    values it reads, where searches come and go.
    """

    def __init__(self, number: int, rows: list[list[int]], bans: Bans, later: int = 0) -> None:
        self.number, self.rows, self.bans, self.later = number, rows, bans, later
        self.begun = len(rows[0])
        self.fed = self.begun
        self.parents = list(range(len(rows)))
        self.tag: Any = None
        self.source = 0

    @property
    def is_ready(self) -> bool:
        """Whether all its tokens are fed, so that the next can be chosen."""
        return self.fed == len(self.rows[0])

    @property
    def count(self) -> int:
        """The rows that it has in the cache: one while it is fed the same beginning for all."""
        return len(self.rows) if self.fed >= self.begun else min(self.fed, 1)

    def feed(self) -> tuple[list[int], list[int]]:
        """From which of its rows in the cache those of the next step go on, -1 where it has none
        yet, and the token of each."""
        is_last = self.fed == len(self.rows[0]) - 1
        if self.fed >= self.begun:
            parents = self.parents
        else:
            parents = [0 if self.fed else -1] * (len(self.rows) if is_last else 1)
        tokens = [row[self.fed] for row in self.rows[: len(parents)]]
        self.fed += 1
        return parents, tokens


class BeamSearch(Search):
    """The beams of one image, as transformers' loop ranks them."""

    def __init__(self, number: int, rows: list[list[int]], bans: Bans, later: int = 0) -> None:
        super().__init__(number, rows, bans, later)
        self.paths: list[list[int]] = [[] for _ in rows]
        self.scores = [0.0] + [_FAR] * (len(rows) - 1)
        self.found = [Sentence(_FAR, rows[0], []) for _ in rows]
        self.improves = True

    @property
    def is_full(self) -> bool:
        return all(one.ended for one in self.found)

    def is_over(self, ends: list[bool], early: bool) -> bool:
        """Whether it ends, where it is alone, after a step whose candidates ended so."""
        return not self.improves or all(ends) or (early and self.is_full)

    def step(self, candidates: list[Candidate], ends: list[bool], early: bool, hope: float) -> None:
        """Go on with the best of these that do not end, and keep the best that do.

        hope: what `Candidate.value` is divided by for `Candidate.hoped`.
        """
        beams, first = len(self.rows), self.number * len(self.rows)
        values = float32([c.value + _FAR if end else c.value for c, end in zip(candidates, ends)])
        chosen = _top(values, beams)
        full = self.is_full
        just = ends[:beams] + [False] * (len(candidates) - beams)
        if any(just) or not full:
            self._merge(candidates, just, _FAR * (full and early), first)
        best = candidates[chosen[0]]
        hoped = over([values[chosen[0]]], hope)[0] if ends[chosen[0]] else best.hoped
        self.rows, self.paths, self.scores, self.parents = (
            [self.rows[candidates[i].beam] + [candidates[i].token] for i in chosen],
            [self.paths[candidates[i].beam] + [first + candidates[i].beam] for i in chosen],
            [values[i] for i in chosen],
            [candidates[i].beam for i in chosen],
        )
        worst = min(one.score for one in self.found)
        self.improves &= any(hoped > (worst if one.ended else _FAR) for one in self.found)
        self.bans.grow(self.parents, self.rows)

    def _merge(
        self, candidates: list[Candidate], just: list[bool], late: float, first: int
    ) -> None:
        """The best of what had ended and what ends now."""
        scores = [one.ranked for one in candidates]
        if late:
            scores = float32([score + late for score in scores])
        if not self.improves:
            scores = float32([score + _FAR for score in scores])
        ranked = float32([s if ended else s + _FAR for s, ended in zip(scores, just)])
        scores = [one.score for one in self.found] + ranked
        kept, beams = [], len(self.found)
        for i in _top(scores, beams):
            if i < beams:
                kept.append(self.found[i])
                continue
            c = candidates[i - beams]
            tokens, path = self.rows[c.beam] + [c.token], self.paths[c.beam] + [first + c.beam]
            kept.append(Sentence(scores[i], tokens, path, just[i - beams]))
        self.found = kept


class GreedySearch(Search):
    """One row, which takes the best token each time. Its score is that of `TokenScores.of`."""

    def __init__(self, number: int, rows: list[list[int]], bans: Bans, later: int = 0) -> None:
        super().__init__(number, rows, bans, later)
        self.scores, self.found = [0.0], [Sentence(0.0, rows[0], [])]

    def is_over(self, ends: list[bool], early: bool) -> bool:
        return ends[0]

    def step(self, candidates: list[Candidate], ends: list[bool], early: bool, hope: float) -> None:
        best = candidates[0]
        self.rows = [[*self.rows[0], best.token]]
        self.scores[0] += best.value
        self.found = [Sentence(self.scores[0], self.rows[0], [], ends[0])]
        self.bans.grow(None, self.rows)


def float32(numbers: list[float]) -> list[float]:
    """Rounded: sums and quotients of two float32 are what float32 arithmetic gives."""
    return array("f", numbers).tolist()


def over(values: Sequence[float], by: float) -> list[float]:
    """Quotients in float32; what a length to a power comes to may be 0 there."""
    (divisor,) = float32([by])
    if divisor:
        return float32([value / divisor for value in values])
    return [math.copysign(math.inf, value) if value else math.nan for value in values]


def descending(values: list[float]) -> list[int]:
    """The places of the highest, then of the others; of equal ones the lower first, and NaN above
    all, as PyTorch sorts."""
    places: Sequence[int] = range(len(values))
    above = [place for place in places if values[place] != values[place]]
    if above:
        places = [place for place in places if values[place] == values[place]]
    return above + sorted(places, key=values.__getitem__, reverse=True)


def _top(values: list[float], count: int) -> list[int]:
    """The places of the highest, descending."""
    order = descending(values)
    if any(values[a] == values[b] for a, b in pairwise(order[: count + 1])):
        return list(_top_of_equal(tuple(values), count))
    return order[:count]


@functools.lru_cache(maxsize=1024)
def _top_of_equal(values: tuple[float, ...], count: int) -> tuple[int, ...]:
    """Which of equal values come first is PyTorch's to say. What has not ended is equally far from
    the best at nearly every step: asked once."""
    return tuple(torch.topk(torch.tensor(values), count).indices.tolist())
