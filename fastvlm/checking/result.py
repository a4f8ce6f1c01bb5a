"""What fastvlm.check found: a verdict for each thing compared, what each side took, a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fastvlm.tables import text_table

SAME, TIE, DIFFERENT, LEFT_OUT = "same", "same but for ties", "DIFFERENT", "not compared"


@dataclass(frozen=True)
class Verdict:
    """One thing compared.

    difference: the largest |difference|, as a number's, of what stands in detail if it is one of
    many; None where tokens are compared. allowed: how large it may be. verdict: "same", "same but
    for ties" (tokens whose scores are equal to rounding), "DIFFERENT" or "not compared". detail:
    where, or why.
    """

    what: str
    verdict: str
    difference: float | None = None
    allowed: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Cost:
    """seconds and mib: of one call without and with fastvlm; mib is what it took beyond before."""

    what: str
    seconds: tuple[float, float]
    mib: tuple[float, float]


@dataclass
class Check:
    """The result of `fastvlm.check`; ``print`` shows it as two tables.

    verdicts: what was compared. costs: what each side took. yardstick: what the allowed
    differences are measured by. notes: what was left out and why. patch_report: of the patch that
    was tried; empty where the model was patched already. batch: the inputs, in words.
    """

    model: str
    batch: str
    yardstick: str = ""
    verdicts: list[Verdict] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    memory_method: str = ""
    patch_report: str = ""

    @property
    def different(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.verdict == DIFFERENT]

    @property
    def ok(self) -> bool:
        """Whether something was compared and nothing is different."""
        compared = any(v.verdict in (SAME, TIE) for v in self.verdicts)
        return compared and not self.different

    @property
    def exit_code(self) -> int:
        """For scripts: 0 where it is ok, else 1."""
        return 0 if self.ok else 1

    def as_dict(self) -> dict[str, Any]:
        """Everything, in the types of JSON."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        head = f"fastvlm.check({self.model}): {'same' if self.ok else 'DIFFERENT'}\n{self.batch}"
        rows = [
            (v.what, _number(v.difference), _number(v.allowed), v.verdict, v.detail)
            for v in self.verdicts
        ]
        parts = [head, text_table(("", "difference", "allowed", "verdict", ""), rows)]
        if self.yardstick:
            parts.append(f"allowed: {self.yardstick}")
        if self.costs:
            parts.append(text_table(_COST_HEADERS, [_cost(cost) for cost in self.costs]))
            parts.append(f"memory beyond what was held before: {self.memory_method}")
        parts += [f"note: {note}" for note in self.notes]
        return "\n\n".join(parts)


_COST_HEADERS = ("", "transformers", "fastvlm", "ratio", "transformers", "fastvlm", "ratio")


def _cost(cost: Cost) -> tuple[str, ...]:
    (own, ours), (held, holds) = cost.seconds, cost.mib
    times = (f"{own:.3f} s", f"{ours:.3f} s", f"{own / max(ours, 1e-9):.2f}x")
    if max(held, holds) < 1:
        return cost.what, *times, "below 1 MiB", "below 1 MiB", ""
    less = f"{held / holds:.2f}x" if holds >= 1 else ""
    return cost.what, *times, f"{held:.0f} MiB", f"{holds:.0f} MiB", less


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
