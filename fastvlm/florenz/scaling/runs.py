"""What one training run was and what it reached."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm.checks import fail

_OP = "florenz.scaling"
_NUMBERS = ("parameters", "trainable", "samples", "macs_per_sample")


@dataclass(frozen=True)
class Run:
    """One run: a size, so many samples, and the losses that it ended with.

    parameters, trainable: counts. samples: those that training saw. macs_per_sample: multiply-adds
    of a forward pass of one. losses: by group, e.g. "UC" unseen captioning, "ST" seen translation,
    "SC" seen captioning: the mean over samples of the mean over tokens. languages: those that the
    decoder knew before training, or None. ValueError: a number that is not above 0.
    """

    size: str
    parameters: int
    trainable: int
    samples: int
    macs_per_sample: float
    losses: Mapping[str, float]
    languages: int | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            _positive(name, getattr(self, name))
        if self.languages is not None:
            _positive("languages", self.languages)
        if not self.losses:
            raise fail(_OP, "losses", "given for one group or more", self.losses)
        for group, loss in self.losses.items():
            _positive(f"the loss of {group}", loss)

    @property
    def gmacs(self) -> float:
        """C of the first law, in 10^9 multiply-adds: S F (1 + P_t / P)."""
        share = 1 + self.trainable / self.parameters
        return self.samples * self.macs_per_sample * share / 1e9


def _positive(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise fail(_OP, name, "a number above 0", value)


def read_runs(file: Path | str) -> list[Run]:
    """The runs of a file, one JSON object a line with the fields of `Run`.

    ValueError: a line that is none, named by its number; a file without lines.
    """
    runs = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            runs.append(Run(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"fastvlm.{_OP}: {file}:{number}: {error}") from None
    if not runs:
        raise fail(_OP, "runs", "one line of JSON or more", str(file))
    return runs
