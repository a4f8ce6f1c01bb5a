"""Logits processors of transformers that change few tokens: what they do, told without scores.

Each bans some tokens (sets them to -inf) or forces some (sets them to 0 and all others to -inf).
The best of what a ban leaves are among as many more of the best as tokens are banned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import generation

_NO_REPEAT = generation.NoRepeatNGramLogitsProcessor
MIN_LENGTH = generation.MinLengthLogitsProcessor
# of each class the attribute with its tokens, and of each of its instances whether it acts on rows
# of n tokens, that would have m if they had begun with as many as the rows it was made for
_FORCES: dict[type, tuple[str, Any]] = {
    generation.ForcedBOSTokenLogitsProcessor: ("bos_token_id", lambda p, n, m: n == 1),
    generation.ForcedEOSTokenLogitsProcessor: (
        "eos_token_id",
        lambda p, n, m: m == p.max_length - 1,
    ),
}
_BANS: dict[type, tuple[str, Any]] = {
    MIN_LENGTH: ("eos_token_id", lambda p, n, m: n < p.min_length),
    generation.MinNewTokensLengthLogitsProcessor: (
        "eos_token_id", lambda p, n, m: m - p.prompt_length_to_skip < p.min_new_tokens,
    ),
    generation.SuppressTokensLogitsProcessor: ("suppress_tokens", lambda p, n, m: True),
    generation.SuppressTokensAtBeginLogitsProcessor: (
        "begin_suppress_tokens", lambda p, n, m: m == p.begin_index,
    ),
}  # fmt: skip
KNOWN = (*_FORCES, *_BANS, _NO_REPEAT)


def unknown(processors: Iterable[Any]) -> str | None:
    """The name of a processor that must see the scores; None where there is none."""
    return next((type(p).__name__ for p in processors if type(p) not in KNOWN), None)


@dataclass(frozen=True)
class Banned:
    """What may not come next: tokens everywhere, or of_rows, a list for each row.

    forced: the only tokens that may. What is banned is banned of these too.
    """

    everywhere: tuple[int, ...] = ()
    of_rows: Sequence[Sequence[int]] | None = None
    forced: tuple[int, ...] | None = None

    @property
    def most(self) -> int:
        """How many tokens of a row are banned at most."""
        return len(self.everywhere) + max(map(len, self.of_rows or ()), default=0)

    def holds(self, row: int, token: int) -> bool:
        """Whether this token of this row is banned."""
        return token in self.everywhere or (self.of_rows is not None and token in self.of_rows[row])

    def tensors(self, device: torch.device) -> list[Tensor]:
        """int64 [1 or R, n] each; -1 is none."""
        found = []
        if self.everywhere:
            found.append(torch.tensor([self.everywhere], device=device))
        if self.of_rows is not None:
            longest = max(map(len, self.of_rows))
            rows = [[*row, *[-1] * (longest - len(row))] for row in self.of_rows]
            found.append(torch.tensor(rows, device=device))
        return found


NONE = Banned()


def together(each: Sequence[Banned], rows: int) -> list[tuple[list[int], Banned]]:
    """What is banned of several searches, of so many rows each: the places of those of which the
    same tokens are banned everywhere, or forced, and what is banned of all of their rows."""
    alike: dict[Any, list[int]] = {}
    for place, one in enumerate(each):
        alike.setdefault((one.everywhere, one.forced), []).append(place)
    found = []
    for (everywhere, forced), places in alike.items():
        of_rows: list[Sequence[int]] | None = None
        if any(each[place].of_rows is not None for place in places):
            of_rows = [row for p in places for row in each[p].of_rows or [()] * rows]
        nothing = not everywhere and of_rows is None and forced is None
        found.append((places, NONE if nothing else Banned(everywhere, of_rows, forced)))
    return found


class Bans:
    """What known processors ban as rows grow.

    processors: of classes in `KNOWN`. rows: the tokens of each row so far. later: how many more
    these are than the rows began with that the processors were made for.
    """

    def __init__(self, processors: Iterable[Any], rows: list[list[int]], later: int = 0) -> None:
        self._later = later
        self._rules: list[tuple[str, Any, Any]] = []
        for one in processors:
            if type(one) is _NO_REPEAT:
                self._rules.append(("no-repeat", NGrams(one.ngram_size, rows), None))
                continue
            kind, table = ("force", _FORCES) if type(one) in _FORCES else ("ban", _BANS)
            name, acts = table[type(one)]
            tokens = tuple(torch.as_tensor(getattr(one, name)).flatten().tolist())
            self._rules.append((kind, tokens, (acts, one)))
        self._grams = [what for kind, what, _ in self._rules if kind == "no-repeat"]

    def next(self, rows: list[list[int]]) -> Banned:
        """What may not follow rows, all of one length."""
        if not self._rules or not rows:
            return NONE
        length = len(rows[0])
        everywhere: tuple[int, ...] = ()
        of_rows: list[list[int]] | None = None
        forced: tuple[int, ...] | None = None
        for kind, what, when in self._rules:
            if kind == "no-repeat":
                found = what.after(rows)
                if found is not None:
                    of_rows = found if of_rows is None else [a + b for a, b in zip(of_rows, found)]
            elif when[0](when[1], length, length - self._later):
                if kind == "ban":
                    everywhere += what
                else:
                    forced, everywhere, of_rows = what, (), None
        if not everywhere and of_rows is None and forced is None:
            return NONE
        return Banned(everywhere, of_rows, forced)

    def grow(self, parents: Sequence[int] | None, rows: list[list[int]]) -> None:
        """rows: those of now, one token longer than their parents (None: each its own)."""
        for grams in self._grams:
            grams.grow(parents, rows)

    def keep(self, places: Sequence[int]) -> None:
        """Only these rows are left."""
        for grams in self._grams:
            grams.tables = [grams.tables[place] for place in places]


class NGrams:
    """Which tokens followed each n - 1 tokens of a row."""

    def __init__(self, n: int, rows: list[list[int]]) -> None:
        self.n = n
        self.tables: list[dict[tuple[int, ...], tuple[int, ...]]] = []
        for row in rows:
            table: dict[tuple[int, ...], tuple[int, ...]] = {}
            for end in range(n, len(row) + 1):
                _note(table, row, end, n)
            self.tables.append(table)

    def after(self, rows: list[list[int]]) -> list[list[int]] | None:
        """Of each row what would repeat an n-gram; None where nothing would."""
        n = self.n
        if len(rows[0]) < n:
            return None
        found = [
            table.get(tuple(row[len(row) - n + 1 :]), ()) for table, row in zip(self.tables, rows)
        ]
        return [list(tokens) for tokens in found] if any(found) else None

    def grow(self, parents: Sequence[int] | None, rows: list[list[int]]) -> None:
        if parents is not None:
            taken: set[int] = set()
            tables = []
            for parent in parents:
                table = self.tables[parent]
                tables.append(dict(table) if parent in taken else table)
                taken.add(parent)
            self.tables = tables
        if rows and len(rows[0]) >= self.n:
            for table, row in zip(self.tables, rows):
                _note(table, row, len(row), self.n)


def _note(table: dict[tuple[int, ...], tuple[int, ...]], row: list[int], end: int, n: int) -> None:
    key = tuple(row[end - n : end - 1])
    known = table.get(key, ())
    if row[end - 1] not in known:
        table[key] = (*known, row[end - 1])
