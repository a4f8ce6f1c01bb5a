"""What the CPU kernels are to reach, as data, and whether a results file shows it.

A target holds for each of its cases, so the case that is furthest from it is what counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import NORM, ROPE

Figures = dict[str, Any]

# what a target measures
FASTER, FLOOR, BYTES, MEMORY = "times faster", "of the floor", "of the bytes", "of the memory"
AT_MOST = (BYTES, MEMORY)


@dataclass(frozen=True)
class Target:
    """bound: at least, for what is better when larger, else at most; in the unit of `measure`.

    against: baselines; of several that a case has, its fastest.
    """

    work: str
    cases: tuple[str, ...]
    dtype: str
    against: tuple[str, ...]
    measure: str
    bound: float


@dataclass(frozen=True)
class Outcome:
    """measured: the figure furthest from the bound, None where the file lacks a case."""

    target: Target
    measured: float | None
    case: str

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        if self.target.measure in AT_MOST:
            return self.measured <= self.target.bound
        return self.measured >= self.target.bound


def _mlp(*rows: int) -> tuple[str, ...]:
    return tuple(f"mlp-gemma2-2b-{n}" for n in rows)


_F32, _BF16 = "float32", "bfloat16"
_ENGINES = ("onnxruntime", "openvino")
_MLP = "GeGLU MLP of Gemma-2-2B"
_STEP = ("attention-florence2-large-8x4", "attention-plain-gemma2-2b-8x4")
_NORMS = (*(case.name for case in NORM), *(case.name for case in ROPE))
_WHOLE_STEP = "cross-attention of a step, 8 images x 4 beams"
_CROSS = "cross-attention in training, 48 captions of 4 images"
_LOSS = "cross-entropy of 512 rows over 256,000, forward and backward"

TARGETS = (
    Target(f"{_MLP}, 3 to 16 rows", _mlp(3, 4, 8, 16), _F32, ("torch",), FASTER, 3.0),
    Target(f"{_MLP}, 1 row", _mlp(1), _F32, ("torch",), FASTER, 1.0),
    Target(f"{_MLP}, 1 to 32 rows", _mlp(1, 3, 4, 8, 16, 32), _F32, _ENGINES, FASTER, 0.97),
    Target(f"{_MLP}, 8 and 16 rows", _mlp(8, 16), _F32, _ENGINES, FASTER, 1.2),
    Target(f"{_MLP}, 3 to 16 rows", _mlp(3, 4, 8, 16), _BF16, ("torch",), FASTER, 4.0),
    Target(f"{_MLP}, 1 to 16 rows", _mlp(1, 3, 4, 8, 16), _BF16, ("onnxruntime",), FASTER, 1.5),
    Target(f"{_MLP}, 1 to 4 rows", _mlp(1, 3, 4), _F32, (), FLOOR, 0.85),
    Target(f"{_MLP}, 1 row", _mlp(1), _BF16, (), FLOOR, 0.70),
    Target(_WHOLE_STEP, _STEP, _F32, ("sdpa",), FASTER, 3.0),
    # the keys and values are a quarter; queries and output, the same for both, are the rest
    Target(_WHOLE_STEP, _STEP, _F32, (), BYTES, 0.255),
    Target(
        f"{_CROSS}, softcap", ("attention-train-cross-gemma2-2b",), _F32, ("eager",), FASTER, 4.0
    ),
    Target(_CROSS, ("attention-train-cross-florence2-large",), _F32, ("sdpa",), FASTER, 2.0),
    Target(
        "self-attention in training, the same captions, softcap",
        ("attention-train-self-gemma2-2b",), _F32, ("eager",), FASTER, 3.0,
    ),
    Target(_LOSS, ("loss-256000",), _F32, ("eager",), FASTER, 2.0),
    Target(_LOSS, ("loss-256000",), _F32, ("eager",), MEMORY, 0.05),
    Target(
        "top-k of 32 rows over 257,024", ("loss-topk-257024-32",), _F32, ("eager",), FASTER, 2.0
    ),
    Target(
        "vision tower of Florence-2-base, 768 px",
        ("vision-florence2-base-768",), _F32, ("transformers",), FASTER, 1.3,
    ),
    Target("norms and rope", _NORMS, _F32, ("eager",), FASTER, 2.0),
    Target("norms and rope", _NORMS, _F32, ("torch.compile",), FASTER, 1.0),
)  # fmt: skip

# a step of Florence-2-base, 3 beams, against the faster of ONNX Runtime and OpenVINO with float32
# weights (benchmarks.decoding_engines): times faster, at least
STEP_AGAINST_ENGINES = {"fastvlm": 1.0, "fastvlm, bf16": 1.5}


def _figure(target: Target, case: Figures) -> float | None:
    if target.measure == FLOOR:
        share: float = case["floor_share"]["fastvlm"]
        return share
    if target.measure == BYTES:
        return case["bytes"] / case["baseline_bytes"] if "baseline_bytes" in case else None
    values = case["median_us"] if target.measure == FASTER else case.get("extra_memory_mib", {})
    theirs = [values[name] for name in target.against if name in values]
    if not theirs:
        return None
    fastest: float = min(theirs)
    if target.measure == FASTER:
        return fastest / values["fastvlm"]
    return values["fastvlm"] / fastest


def outcomes(cases: Sequence[Figures]) -> list[Outcome]:
    """For each target what the cases of a results file show."""
    by_name = {(case["case"], case["dtype"]): case for case in cases}
    found = []
    for target in TARGETS:
        figures = []
        for name in target.cases:
            case = by_name.get((name, target.dtype))
            figure = None if case is None else _figure(target, case)
            if figure is not None:
                figures.append((figure, name))
        furthest = max if target.measure in AT_MOST else min
        complete = len(figures) == len(target.cases)
        measured, name = furthest(figures) if complete else (None, "")
        found.append(Outcome(target, measured, name))
    return found
