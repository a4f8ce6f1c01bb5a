"""What a decoding loop was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastvlm.generate.bans import NONE, Banned, Bans
from fastvlm.generate.ends import Ends
from fastvlm.generate.head import Last, mask_logits
from fastvlm.generate.steps import Steps


class Notes(Protocol):
    """Who wants the log-probability of each token that greedy decoding or sampling took."""

    def note(self, taken: Tensor) -> None:
        """taken: float32 [rows], NaN of rows that have left; of one step."""


@dataclass
class Plan:
    """One loop, whatever its kind.

    config: the GenerationConfig that generate() prepared. processors: those of transformers that
    must see all scores of a step, all of them, or None where `Bans` knows each. ranks: whether the
    best of a ranking do. known: the processors that it knows. eos: the tokens that end a sentence.
    """

    steps: Steps
    ends: Ends
    config: Any
    device: torch.device
    processors: Any = None
    known: tuple[Any, ...] = ()
    ranks: bool = False
    notes: Notes | None = None

    def __post_init__(self) -> None:
        tokens = self.config._eos_token_tensor
        self.eos: list[int] = [] if tokens is None else tokens.flatten().tolist()

    def bans(self, rows: list[list[int]], later: int = 0) -> Bans:
        return Bans(self.known, rows, later)

    def processed(self, rows: list[list[int]], scores: Tensor, banned: Banned) -> Tensor:
        """scores float32 [R, V], which may be written into, as all processors leave them."""
        if self.processors is not None:
            ids = torch.tensor(rows, dtype=torch.int64, device=self.device)  # [R, 0] as well
            found: Tensor = self.processors(ids, scores)
            return found
        return scores if banned is NONE else mask_logits(scores, banned)

    def logits(self, last: Last) -> Tensor:
        """float32 [R, V], a copy."""
        return last.all_logits().to(copy=True, dtype=torch.float32, device=self.device)


@dataclass
class Written:
    """What a loop wrote. scores, beams: of beam search."""

    sequences: Tensor
    scores: Tensor | None = None
    beams: Tensor | None = None
