"""What a patch did: one entry for each module, patched with which op or skipped and why."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fastvlm.tables import text_table


@dataclass(frozen=True)
class Entry:
    """module: dotted name; kind: its class; ops: what it runs on now; reason: why skipped."""

    module: str
    kind: str
    ops: tuple[str, ...]
    reason: str | None = None

    @property
    def patched(self) -> bool:
        return self.reason is None


@dataclass
class Report:
    """The entries of one `fastvlm.patch`; ``print(report)`` shows them as a table."""

    model: str
    entries: list[Entry] = field(default_factory=list)

    @property
    def patched(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.patched]

    @property
    def skipped(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.patched]

    def __str__(self) -> str:
        rows = []
        for (name, kind, ops, reason), count in self._grouped().items():
            times = f" ({count}x)" if count > 1 else ""
            status = ", ".join(ops) if reason is None else f"skipped: {reason}"
            rows.append((name + times, kind, status))
        head = (
            f"fastvlm.patch({self.model}): {len(self.patched)} modules patched, "
            f"{len(self.skipped)} skipped"
        )
        return f"{head}\n\n" + text_table(("module", "class", "runs on"), rows)

    def _grouped(self) -> dict[tuple[str, str, tuple[str, ...], str | None], int]:
        """Layers that differ only in their number are one row."""
        groups: dict[tuple[str, str, tuple[str, ...], str | None], int] = {}
        for entry in self.entries:
            name = re.sub(r"\.\d+(?=\.|$)", ".*", entry.module) or "(model)"
            key = (name, entry.kind, entry.ops, entry.reason)
            groups[key] = groups.get(key, 0) + 1
        return groups
