"""What decoding is to reach, as data, and whether the results files show it.

A verdict is that of the figure in the file, not of what is printed of it; a figure of a run whose
tokens were not transformers' meets no target, but for weights in fewer bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.targets import BYTES, FASTER, FLOOR, STEP_AGAINST_ENGINES

Figures = dict[str, Any]
# by the stem of their file
Files = Mapping[str, Figures]

END_TO_END, DECODING, ENGINES = "end_to_end-cpu", "decoding-cpu", "decoding-engines-cpu"
# sides of the cases of benchmarks.decoding
AS_PUBLISHED = "without a cache, as published"
SEPARATE, TOGETHER = "six calls of transformers", "fastvlm.caption"


@dataclass(frozen=True)
class Found:
    """A figure; same: whether the tokens were those of the other side."""

    value: float
    same: bool


@dataclass(frozen=True)
class Target:
    """bound: at most where bytes are measured, else at least. found: None where the files lack it.

    other_tokens: whether the work may give others (weights in 8 bits).
    """

    work: str
    against: str
    measure: str
    bound: float
    found: Callable[[Files], Found | None]
    other_tokens: bool = False

    def met(self, files: Files) -> bool | None:
        """Whether the files show it; None where nothing was measured."""
        figure = self.found(files)
        if figure is None:
            return None
        if not (figure.same or self.other_tokens):
            return False
        if self.measure == BYTES:
            return figure.value <= self.bound
        return figure.value >= self.bound


def _whole(model: str, beams: int, weights: str | None) -> Callable[[Files], Found | None]:
    """The decoding part of a whole call."""

    def found(files: Files) -> Found | None:
        for case in files.get(END_TO_END, {}).get("cases", ()):
            work = case["workload"]
            if (work["model"], work["beams"], case.get("weights")) == (model, beams, weights):
                return Found(case["ratio"]["decoding"], case["identical_tokens"])
        return None

    return found


def _case(named: str, figure: Callable[[Figures], float | None]) -> Callable[[Files], Found | None]:
    """A figure of the case of `benchmarks.decoding` that has `named` in its name."""

    def found(files: Files) -> Found | None:
        for case in files.get(DECODING, {}).get("cases", ()):
            if named in case["case"]:
                value = figure(case)
                return None if value is None else Found(value, case["identical_tokens"])
        return None

    return found


def _beside_engines(side: str) -> Callable[[Files], Found | None]:
    def found(files: Files) -> Found | None:
        figures = files.get(ENGINES, {})
        value = figures.get("ratio", {}).get(side)
        return None if value is None else Found(value, figures["sides"][side]["identical_tokens"])

    return found


def _faster(than: str, side: str) -> Callable[[Figures], float]:
    return lambda case: case["seconds"][than] / case["seconds"][side]


def _cache_share(case: Figures) -> float | None:
    held = case.get("cross_cache_bytes")
    return None if held is None else held[TOGETHER] / held[SEPARATE]


_BASE = "Florence-2-base, 3 beams, 64 tokens, decoding part"
_STEP = "a step of Florence-2-base, 3 beams"
_LANGUAGES = "1 image x 6 languages x 4 beams"
_SDPA, _ENGINES = "transformers sdpa", "the faster of ONNX Runtime and OpenVINO"

TARGETS = (
    Target(_BASE, _SDPA, FASTER, 4.0, _whole("Florence-2-base", 3, None)),
    Target(f"{_BASE}, bf16 weights", _SDPA, FASTER, 6.0, _whole("Florence-2-base", 3, "bf16")),
    Target(
        f"{_BASE}, int8 weights", _SDPA, FASTER, 8.0, _whole("Florence-2-base", 3, "int8"),
        other_tokens=True,
    ),
    Target(
        "Florence-2-large, 4 beams, decoding part", _SDPA, FASTER, 4.0,
        _whole("Florence-2-large", 4, None),
    ),
    *(
        Target(
            _STEP + ("" if side == "fastvlm" else ", bf16 weights"), _ENGINES, FASTER, least,
            _beside_engines(side),
        )
        for side, least in STEP_AGAINST_ENGINES.items()
    ),
    Target(_LANGUAGES, SEPARATE, FASTER, 8.0, _case("languages", _faster(SEPARATE, TOGETHER))),
    Target(
        f"{_LANGUAGES}, cross cache", SEPARATE, BYTES, 1 / 24, _case("languages", _cache_share)
    ),
    Target(
        "Florenz with a Gemma-2 decoder, 4 beams, 128 tokens", AS_PUBLISHED, FASTER, 30.0,
        _case("Florenz", _faster(AS_PUBLISHED, "fastvlm")),
    ),
    Target(_STEP, "", FLOOR, 0.65, _case(_STEP, lambda case: case["floor_share"])),
)  # fmt: skip


def verdict(met: bool | None) -> str:
    return {True: "met", False: "NOT MET", None: "-"}[met]


def of_the_floor(share: float) -> str:
    """The share of the floor that a step reaches, beside its target."""
    least = next(target.bound for target in TARGETS if target.measure == FLOOR)
    return f"{100 * share:.1f} % of the floor (target {100 * least:g} %: {verdict(share >= least)})"


def table(files: Files) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers and rows: every target, what was measured, and the verdict."""

    def shown(target: Target, value: float) -> str:
        if target.measure == FASTER:
            return f"{value:.2f}x"
        return f"{100 * value:.1f} % {target.measure}"

    rows = []
    for target in TARGETS:
        figure = target.found(files)
        measured = "not measured" if figure is None else shown(target, figure.value)
        if figure is not None and not figure.same:
            measured += ", other tokens"
        bound = shown(target, target.bound)
        if target.measure == BYTES:
            bound = f"1/{1 / target.bound:.0f} {target.measure}"
        least = "at most" if target.measure == BYTES else "at least"
        row = (target.work, target.against or "-", f"{least} {bound}", measured)
        rows.append((*row, verdict(target.met(files))))
    return ("work", "against", "target", "measured", ""), rows
