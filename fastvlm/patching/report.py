"""What a patch did: one entry for each module, patched with which op or skipped and why."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fastvlm.tables import text_table


@dataclass(frozen=True)
class Entry:
    """module: dotted name; kind: its class; ops: what it runs on now; reason: why skipped.

    reads: with weights, for a layer that a decoding step runs: the type in which its weight is read
    and the bytes of the weight itself and of what is read.
    """

    module: str
    kind: str
    ops: tuple[str, ...]
    reason: str | None = None
    reads: tuple[str, tuple[int, int]] | None = None

    @property
    def patched(self) -> bool:
        return self.reason is None


@dataclass
class Report:
    """The entries of one `fastvlm.patch`; ``print(report)`` shows them as a table.

    huge_bytes: of the weights that a decoding step reads, what lies on huge pages now.
    notes: of the model as a whole: what was asked for, versions that fastvlm is not tested on,
    devices whose kernels do not run here, stacks of layers that nothing is known of.
    """

    model: str
    entries: list[Entry] = field(default_factory=list)
    huge_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def patched(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.patched]

    @property
    def skipped(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.patched]

    @property
    def step_bytes(self) -> tuple[int, int] | None:
        """With weights: the bytes of weights behind one decoding step, and those that it reads."""
        sizes = [entry.reads[1] for entry in self.entries if entry.reads is not None]
        return (sum(s[0] for s in sizes), sum(s[1] for s in sizes)) if sizes else None

    def __str__(self) -> str:
        rows = []
        for (name, kind, ops, reason, reads), count in self._grouped().items():
            times = f" ({count}x)" if count > 1 else ""
            status = ", ".join(ops) if reason is None else f"skipped: {reason}"
            rows.append((name + times, kind, reads, status))
        head = (
            f"fastvlm.patch({self.model}): {len(self.patched)} modules patched, "
            f"{len(self.skipped)} skipped"
        )
        head += "".join(f"\n{note}" for note in self.notes)
        if self.huge_bytes:
            head += f"\n{self.huge_bytes / 2**20:.0f} MiB of its weights lie on huge pages"
        if self.step_bytes is None:
            without = [(name, kind, status) for name, kind, _, status in rows]
            return f"{head}\n\n" + text_table(("module", "class", "runs on"), without)
        own, read = (size / 2**20 for size in self.step_bytes)
        instead = f" instead of {own:.2f} MiB" if read != own else ", as without fastvlm"
        head += f"\na decoding step reads {read:.2f} MiB of weights{instead}"
        return f"{head}\n\n" + text_table(("module", "class", "weights", "runs on"), rows)

    def _grouped(self) -> dict[tuple[str, str, tuple[str, ...], str | None, str], int]:
        """Layers that differ only in their number are one row."""
        groups: dict[tuple[str, str, tuple[str, ...], str | None, str], int] = {}
        for entry in self.entries:
            name = re.sub(r"\.\d+(?=\.|$)", ".*", entry.module) or "(model)"
            reads = entry.reads[0] if entry.reads is not None else ""
            key = (name, entry.kind, entry.ops, entry.reason, reads)
            groups[key] = groups.get(key, 0) + 1
        return groups
