"""The counts of all compiled kernels in a file small enough to be kept: `report.save` writes them
whole, megabytes that belong to a release.

Of each compilation a digest of what was asked for, a digest of what came of it, and its registers;
of a kernel and an architecture what a reader looks for. So a later run says which compilations came
out in another way, and which are new or gone; of what a kernel is now only that run knows.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm import env
from tools.compiling.driver import Job
from tools.compiling.jobs import Origin, chosen
from tools.compiling.report import KEY, NOT_COMPARED, Row, head

# hexadecimal, of a digest and of a number of registers
DIGITS, REGISTERS = 6, 3
WIDTH = 2 * DIGITS + REGISTERS


@dataclass
class Entry:
    """A kernel on an architecture. rows: digest of (dtype, config, arguments) -> (digest of the
    counts, registers). spilled: how many of its rows use local memory."""

    kernel: str
    arch: str
    source: str
    ops: list[str] = field(default_factory=list)
    spilled: int = 0
    shared: int = 0
    rows: dict[str, tuple[str, int]] = field(default_factory=dict)


Entries = dict[tuple[str, str], Entry]


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:DIGITS]


def key(row: Row) -> str:
    return _digest([row[name] for name in KEY[2:]])


def counts(row: Row) -> str:
    return _digest({name: value for name, value in row.items() if name not in NOT_COMPARED})


def of(rows: Iterable[Row]) -> Entries:
    """Rows of a failure have no counts, and are not kept."""
    found: Entries = {}
    for row in rows:
        if "failure" in row:
            continue
        place = row["kernel"], row["arch"]
        entry = found.setdefault(place, Entry(*place, row["source"]))
        if key(row) in entry.rows:
            raise ValueError(f"{place}: two compilations have one digest, {row['config']}")
        entry.rows[key(row)] = counts(row), row["registers"]
        entry.ops = sorted({*entry.ops, *row["ops"]})
        entry.spilled += bool(row["local"] or row["spill_loads"] or row["spill_stores"])
        entry.shared = max(entry.shared, row["shared"])
    return found


def save(path: Path, triton: str, entries: Entries) -> None:
    lines = []
    for _, entry in sorted(entries.items()):
        registers = [registers for _, registers in entry.rows.values()]
        rows = (
            f"{name}{digest}{registers:0{REGISTERS}x}"
            for name, (digest, registers) in sorted(entry.rows.items())
        )
        lines.append(json.dumps({
            "kernel": entry.kernel, "arch": entry.arch, "source": entry.source, "ops": entry.ops,
            "compiled": len(registers), "registers": [min(registers), max(registers)],
            "spilled": entry.spilled, "shared": entry.shared, "rows": "".join(rows),
        }))  # fmt: skip
    text = json.dumps({**env.stamp(), "triton": triton})[:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + ', "kernels": [\n' + ",\n".join(lines) + "\n]}\n")


def load(path: Path) -> tuple[str, Entries]:
    """The version of Triton that the counts are of, and the counts; of a whole table as well."""
    kept = json.loads(path.read_text())
    if kept["kernels"] and "rows" not in kept["kernels"][0]:
        return kept["triton"], of(kept["kernels"])
    found: Entries = {}
    for line in kept["kernels"]:
        names = ("kernel", "arch", "source", "ops", "spilled", "shared")
        entry = Entry(**{name: line[name] for name in names})
        for start in range(0, len(line["rows"]), WIDTH):
            row = line["rows"][start : start + WIDTH]
            entry.rows[row[:DIGITS]] = row[DIGITS : 2 * DIGITS], int(row[2 * DIGITS :], 16)
        found[entry.kernel, entry.arch] = entry
    return kept["triton"], found


def still_true(entries: Entries, jobs: Mapping[Job, Origin]) -> dict[Job, Row]:
    """Of the jobs those that the file has, from the very code that there is now, as rows without
    counts: the same code compiled twice by one Triton gives the same."""
    found = {}
    for job, origin in jobs.items():
        row = head(job, origin)
        entry = entries.get((job.kernel, job.arch))
        if entry is not None and entry.source == row["source"] and key(row) in entry.rows:
            found[job] = row
    return found


def renewed(
    kept: Entries, true: Iterable[Row], made: Sequence[Row], archs: Sequence[str],
    only: Sequence[str],
) -> Entries:  # fmt: skip
    """kept, without what nothing launches any more, and what was compiled now."""
    result = of(made)
    still: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for row in true:
        still[row["kernel"], row["arch"]].add(key(row))
    for place, entry in kept.items():
        rows = entry.rows
        if entry.arch in archs and whole(entry, only):
            rows = {name: row for name, row in rows.items() if name in still[place]}
        if not rows:
            continue
        new = result.setdefault(place, Entry(entry.kernel, entry.arch, entry.source))
        if new.source != entry.source:
            continue  # of other code: none of it was among the true ones
        # none of what is kept spills: it would not have been kept
        new.rows = {**rows, **new.rows}
        new.ops = sorted({*new.ops, *entry.ops})
        new.shared = max(new.shared, entry.shared)
        new.spilled += entry.spilled
    return result


def whole(entry: Entry, only: Sequence[str]) -> bool:
    """Whether a run with this selection makes all rows of an entry again."""
    return not only or all(chosen(only, op, entry.kernel) for op in entry.ops)


def _said(row: Row) -> str:
    return "  ".join(row[name] for name in KEY)


def differences(
    kept: Entries, now: Sequence[Row], archs: Sequence[str], only: Sequence[str]
) -> list[str]:
    lines, seen = [], defaultdict[tuple[str, str], set[str]](set)
    for row in now:
        place = row["kernel"], row["arch"]
        seen[place].add(key(row))
        entry = kept.get(place)
        before = None if entry is None else entry.rows.get(key(row))
        if before is None:
            lines.append(f"{_said(row)}: new")
        elif "failure" in row:
            lines.append(f"{_said(row)}: does not compile any more")
        elif before[1] != row["registers"]:
            lines.append(f"{_said(row)}: registers {before[1]} -> {row['registers']}")
        elif before[0] != counts(row):
            lines.append(f"{_said(row)}: other counts, of as many registers ({before[1]})")
    for place, entry in kept.items():
        if entry.arch in archs and whole(entry, only) and (gone := entry.rows.keys() - seen[place]):
            lines.append(f"{entry.kernel}  {entry.arch}: {len(gone)} gone")
    return sorted(lines)
