"""What ends a row: transformers' stopping criteria, most of them without a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)


class Ends:
    """The criteria of a loop.

    eos: the tokens that end a row. length: the tokens that a row has at most. stop: all rows end
    once it returns True. others: criteria that must see the tokens.
    """

    def __init__(self, criteria: Iterable[Any], stop: Callable[[], bool] | None = None) -> None:
        eos: list[int] = []
        # transformers fills ended rows with padding where any criterion knows an end token
        self.fills = any(hasattr(one, "eos_token_id") for one in criteria)
        self.length: int | None = None
        self.stop = stop
        self._timed: list[Any] = []
        self._warns: list[Any] = []
        self.others = StoppingCriteriaList()
        for one in criteria:
            if type(one) is EosTokenCriteria:
                eos += torch.as_tensor(one.eos_token_id).flatten().tolist()
            elif type(one) is MaxLengthCriteria:
                most = one.max_length
                self.length = most if self.length is None else min(self.length, most)
                if one.max_position_embeddings is not None:
                    self._warns.append(one)
            elif type(one) is MaxTimeCriteria:
                self._timed.append(one)
            else:
                self.others.append(one)
        self.eos = frozenset(eos)

    @property
    def is_timed(self) -> bool:
        """Whether something else than tokens and lengths ends all rows."""
        return bool(self._timed or self.stop)

    def all_end(self, length: int, device: torch.device) -> bool:
        """Whether rows of this length end, whatever their tokens are; asked once a step."""
        stopped = self.stop is not None and self.stop()
        if self._timed or self._warns:
            shape_only = torch.empty(1, length, dtype=torch.int64, device=device)
            for one in self._warns:
                if length > one.max_position_embeddings:
                    one(shape_only, None)  # says so, once
            stopped |= any(bool(one(shape_only, None)) for one in self._timed)
        return stopped or (self.length is not None and length >= self.length)

    def of_rows(self, rows: Sequence[Sequence[int]], device: torch.device) -> list[bool]:
        """Whether the criteria that must see the tokens end each row."""
        if not self.others:
            return [False] * len(rows)
        ended: Tensor = self.others(torch.tensor(rows, device=device), None)
        return [bool(end) for end in ended.tolist()]
