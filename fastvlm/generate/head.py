"""The output head of a model in a decoding loop: all scores of a token, or the best alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvlm import ops
from fastvlm.cpu.loss import topk_of_logits
from fastvlm.generate.bans import Banned
from fastvlm.nn.linear import is_low_precision

# the longest ranking that every kernel serves; a longer one is hardly shorter than the logits
MOST_RANKED = 64


@dataclass(frozen=True, eq=False)
class Head:
    """What a model makes of its last states h: softcap * tanh((module(h) + added) / softcap).

    module: a linear layer. added: [..., V] of one row, where the module has no
    bias. dtype: of the logits.
    """

    module: Any
    added: Tensor | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def vocabulary(self) -> int:
        width: int = self.module.weight.shape[0]
        return width

    def same(self, other: Head | None) -> bool:
        """Whether both make the same of the same states."""
        if other is None or self.module is not other.module or self.dtype != other.dtype:
            return False
        if (self.added is None) != (other.added is None) or self.softcap != other.softcap:
            return False
        return self.added is None or torch.equal(self.added, other.added)  # type: ignore[arg-type]

    def logits(self, h: Tensor) -> Tensor:
        """h [R, d] -> [R, V], by the operations of the model."""
        logits: Tensor = self.module(h)
        if self.added is not None:
            logits = logits + self.added
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.to(self.dtype)

    def best(self, h: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """h [R, d] -> log-probabilities and tokens of the k best of each row, [R, k], descending,
        and the logarithm of what all were divided by, [R]."""
        if is_low_precision(self.module):
            logits = self.module(h).float()
            added = None if self.added is None else self.added.flatten().float()
            return topk_of_logits(logits, k, added, self.softcap or 0.0)
        bias = self.module.bias if self.added is None else self.added.flatten().to(h.dtype)
        return ops.linear_topk(h, self.module.weight, k, bias=bias, softcap=self.softcap)


@dataclass(frozen=True)
class Last:
    """What a forward gave for the next token of each row: states [R, d] and the head, or the
    logits [R, V] alone."""

    states: Tensor | None = None
    head: Head | None = None
    logits: Tensor | None = None

    def all_logits(self) -> Tensor:
        if self.logits is not None:
            return self.logits
        assert self.head is not None
        return self.head.logits(self.states)  # type: ignore[arg-type]

    def of(self, rows: Sequence[int]) -> Last:
        """Of these rows alone."""
        given = self.logits if self.states is None else self.states
        assert given is not None
        index = torch.tensor(rows, dtype=torch.int64, device=given.device)
        part = given.index_select(0, index)
        return Last(logits=part) if self.states is None else Last(part, self.head)

    def rankable(self, k: int) -> bool:
        """Whether the best k of a row are found without the logits of all."""
        return self.head is not None and k <= min(MOST_RANKED, self.head.vocabulary)


def best_of_rows(last: Last, k: int, banned: Banned) -> tuple[Tensor, Tensor]:
    """The k best tokens of each row that are not banned, and their log-probabilities, [R, k or
    more]. Descending where nothing is banned."""
    values, tokens = _best(last, k, banned)
    for bans in banned.tensors(tokens.device):
        found = (tokens.unsqueeze(2) == bans.unsqueeze(1)).any(2)
        values = values.masked_fill(found, float("-inf"))
    return values, tokens


def best_lists_of_rows(
    last: Last, k: int, banned: Banned
) -> tuple[list[list[float]], list[list[int]]]:
    """The same as lists, a few numbers of which are banned without a tensor."""
    found = _best(last, k, banned)
    values: list[list[float]] = found[0].tolist()
    tokens: list[list[int]] = found[1].tolist()
    if banned.most:
        for row, (scores, each) in enumerate(zip(values, tokens)):
            for place, token in enumerate(each):
                if banned.holds(row, token):
                    scores[place] = float("-inf")
    return values, tokens


def best_token_of_rows(last: Last, banned: Banned) -> list[int]:
    """The best token of each row that is not banned; 0 where all are, as argmax has it."""
    if banned.forced is None:
        rows: list[list[int]] = _best(last, 1, banned)[1].tolist()
        if not banned.most:
            return [each[0] for each in rows]
    else:
        assert last.states is not None
        rows = [sorted(banned.forced)] * last.states.shape[0]
    return [
        next((token for token in each if not banned.holds(row, token)), 0)
        for row, each in enumerate(rows)
    ]


def _best(last: Last, k: int, banned: Banned) -> tuple[Tensor, Tensor]:
    """Log-probabilities and tokens of each row, as many more than k as may be banned; where some
    are forced these, at 0, and others at -inf."""
    assert last.head is not None
    assert last.states is not None
    wide = min(last.head.vocabulary, k + banned.most)
    if banned.forced is None:
        values, tokens, _ = last.head.best(last.states, wide)
        return values, tokens
    taken, (rows, _) = sorted(banned.forced), last.states.shape
    others = [token for token in range(wide) if token not in taken]
    chosen = torch.tensor(taken + others[: max(0, wide - len(taken))], device=last.states.device)
    values = torch.zeros(rows, chosen.shape[0], device=chosen.device)
    values[:, len(taken) :] = float("-inf")
    return values, chosen.expand(rows, -1)


def mask_logits(scores: Tensor, banned: Banned) -> Tensor:
    """scores float32 [R, V], which may be written into, as processors leave them."""
    width = scores.shape[1]
    if banned.forced is not None:
        scores = torch.full_like(scores, float("-inf"))
        scores[:, banned.forced] = 0
    inside = [token for token in banned.everywhere if token < width]
    if inside:
        scores[:, inside] = float("-inf")
    for row, tokens in enumerate(banned.of_rows or ()):
        within: Sequence[int] = [token for token in tokens if token < width]
        if within:
            scores[row, within] = float("-inf")
    return scores
