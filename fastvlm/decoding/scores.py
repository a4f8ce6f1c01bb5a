"""Scores of generated sequences without the scores of every token of the vocabulary at every step.

transformers gives the score of a sequence only beside all of those, [rows, vocabulary] for each
step: gigabytes, with many languages. A stopping criterion sees them as they come, takes what it
needs and lets go of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class TokenScores(StoppingCriteria):
    """The log-probability of the token that each row took, step by step.

    Goes last in the list of criteria, as it empties the scores that it was given. With beams it
    notes nothing (transformers ranks those itself), and only empties. stop: all rows end once it
    returns True; it is here, as a criterion of its own could have looked at the scores.
    """

    def __init__(self, beams: bool, stop: Callable[[], bool] | None = None) -> None:
        self.beams = beams
        self.stop = stop
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last: Tensor = scores[-1]
        if not self.beams:
            taken = last.gather(1, input_ids[:, -1:]).squeeze(1)
            self.note(taken - last.logsumexp(1))
        last.data = last.new_empty(0)  # generate() holds the same tensor
        ends = self.stop is not None and self.stop()
        return torch.full((input_ids.shape[0],), ends, dtype=torch.bool, device=input_ids.device)

    def note(self, taken: Tensor) -> None:
        """taken: float32 [rows], of one step; a decoding loop of ours calls this alone."""
        self.steps.append(taken)

    def of(self, row: int, tokens: int, length_penalty: float) -> float:
        """The summed log-probability of a row's first tokens, over tokens ** length_penalty, which
        is how beam search ranks; 0 for a caption without tokens, whatever the penalty."""
        if tokens == 0:
            return 0.0  # not 0 ** penalty: a row that the caller's criterion ended among padding
        total = sum(float(step[row]) for step in self.steps[:tokens])
        return total / tokens**length_penalty


def ended(tokens: Sequence[int], ends: Sequence[int], filler: int | None) -> list[int]:
    """Generated tokens up to the first end token, which stays; without one, less the filler."""
    for index, token in enumerate(tokens):
        if token in ends:
            return list(tokens[: index + 1])
    length = len(tokens)
    while filler is not None and length and tokens[length - 1] == filler:
        length -= 1
    return list(tokens[:length])
