"""Compiled kernels as rows: the printed table, the results file, the comparison with a kept one."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvlm import env
from fastvlm.tables import text_table
from fastvlm.triton.compiling.architectures import ARCHITECTURES
from fastvlm.triton.compiling.code import Counts
from fastvlm.triton.compiling.driver import Job, function
from fastvlm.triton.compiling.jobs import Origin, chosen
from fastvlm.triton.compiling.sources import digest
from fastvlm.triton.compiling.verdicts import Verdict, streams
from fastvlm.triton.compiling.work import Result

Row = dict[str, Any]
# what tells rows apart; everything else in a row is compared
KEY = ("kernel", "arch", "dtype", "config", "arguments")
_NOT_COMPARED = (*KEY, "ops", "source")


def _head(job: Job, origin: Origin) -> Row:
    """What is known of a row before anything is compiled."""
    return {
        "kernel": job.kernel,
        "arch": job.arch,
        "dtype": "/".join(sorted(origin.dtypes)),
        "config": job.config,
        "arguments": job.arguments,
        "ops": sorted(origin.ops),
        "source": digest(function(job)),
    }


def row(result: Result, origin: Origin) -> Row:
    job, counts = result.job, result.counts
    found = _head(job, origin)
    if counts is None:
        return {**found, "failure": result.failure.splitlines()[0]}
    programs, limit = ARCHITECTURES[job.arch].occupancy(counts.registers, counts.shared, job.warps)
    counted = dataclasses.asdict(counts)
    if not streams(job):
        del counted["loop_loads"]  # which no rule asks for
    found = {**found, **counted, "programs": programs, "limit": limit}
    found |= {"scalar_loads": result.scalar_loads, "dots": [list(dot) for dot in result.dots]}
    return found | ({"tensor_memory": result.tensor_memory} if result.tensor_memory else {})


def result(job: Job, row: Row) -> Result:
    """What a row was made of, so that kept counts are judged by the rules of now."""
    names = [field.name for field in dataclasses.fields(Counts) if field.name != "loop_loads"]
    dots = tuple((rows, bits) for rows, bits in row["dots"])
    counts = Counts(loop_loads=row.get("loop_loads", {}), **{name: row[name] for name in names})
    return Result(job, 0.0, counts, "", row["scalar_loads"], dots, row.get("tensor_memory", 0))


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def text(rows: Iterable[Row]) -> str:
    """One line for each kernel; a failed one is among the verdicts."""
    headers = (
        "kernel", "arch", "dtype", "config", "regs", "local", "LDL/STL", "shared", "programs",
        "warps", "limited by", "loads", "tensor cores", "loop", "instructions",
    )  # fmt: skip
    return text_table(headers, [_cells(row) for row in rows if "failure" not in row])


def _cells(row: Row) -> tuple[str, ...]:
    warps = next(int(p.partition("=")[2]) for p in row["config"].split() if p.startswith("warps="))
    full = ARCHITECTURES[row["arch"]].full(row["programs"], warps)
    return (
        row["kernel"],
        row["arch"],
        row["dtype"],
        row["config"],
        str(row["registers"]),
        str(row["local"]),
        f"{row['spill_loads']}/{row['spill_stores']}",
        str(row["shared"]),
        str(row["programs"]),
        f"{full:.0%}",
        row["limit"],
        _pairs(row["loads"]),
        _pairs(row["tensor"]),
        str(row["loop"]),
        str(row["instructions"]),
    )


def _pairs(counts: dict[str, int]) -> str:
    return " ".join(f"{name}:{n}" for name, n in counts.items()) or "-"


def verdicts(found: Sequence[Verdict]) -> str:
    """What counts first, then the exceptions with their reasons."""
    parts = []
    wrong = [v for v in found if not v.exception]
    if wrong:
        lines = [
            f"{v.result.job.kernel}  {v.result.job.arch}  {v.result.job.config}  "
            f"{v.result.job.arguments}\n    {v.rule}: {v.words}"
            for v in wrong
        ]
        parts.append("wrong:\n" + "\n".join(lines))
    excepted: defaultdict[tuple[str, str, str, str], int] = defaultdict(int)
    for v in found:
        if v.exception:
            excepted[v.rule, v.result.job.kernel, v.result.job.arch, v.exception] += 1
    if excepted:
        table = [(*cells, str(n)) for cells, n in excepted.items()]
        parts.append(text_table(("excepted", "kernel", "arch", "reason", "compiled"), table))
    return "\n\n".join(parts)


def save(path: Path, triton: str, rows: Sequence[Row]) -> None:
    """One line for each row, so that a change shows in a diff as what changed."""
    lines = ",\n".join(json.dumps(row) for row in sorted(rows, key=key))
    head = json.dumps({**env.stamp(), "triton": triton})[:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head}, "kernels": [\n{lines}\n]}}\n')


def load(path: Path) -> tuple[str, list[Row]]:
    """The version of Triton that a results file is of, and its rows."""
    kept = json.loads(path.read_text())
    return kept["triton"], kept["kernels"]


def selected(rows: Iterable[Row], archs: Sequence[str], only: Sequence[str]) -> list[Row]:
    """The rows that a run with these arguments makes again."""
    return [
        row
        for row in rows
        if row["arch"] in archs and any(chosen(only, op, row["kernel"]) for op in row["ops"])
    ]


def beside(rows: Iterable[Row], archs: Sequence[str], only: Sequence[str]) -> list[Row]:
    """The rows that a run with these arguments says nothing of."""
    made = {key(row) for row in selected(rows, archs, only)}
    return [row for row in rows if key(row) not in made]


def still_true(rows: Iterable[Row], jobs: Mapping[Job, Origin]) -> dict[Job, Row]:
    """Of the jobs those whose counts are among the rows, from the very code that there is now.

    The same code compiled twice by one Triton gives the same counts, so they need no compiler. The
    dtypes and ops that lead to a job are those of now.
    """
    known = {_code(row): row for row in rows if "failure" not in row and "dots" in row}
    found = {}
    for job, origin in jobs.items():
        head = _head(job, origin)
        row = dict(known.get(_code(head), {}))
        if not streams(job):
            row.pop("loop_loads", None)
        elif "loop_loads" not in row:
            continue
        if row:
            found[job] = {**row, **head}
    return found


def _code(row: Row) -> tuple[str, ...]:
    """What decides the machine code. Rows of before there were digests have none of it."""
    names = ("kernel", "arch", "config", "arguments", "source")
    return tuple(row.get(name, "") for name in names)


def differences(kept: Sequence[Row], now: Sequence[Row]) -> list[str]:
    before, after = {key(row): row for row in kept}, {key(row): row for row in now}
    lines = []
    for name in sorted({*before, *after}):
        title = "  ".join(name)
        if name not in after:
            lines.append(f"{title}: gone")
        elif name not in before:
            lines.append(f"{title}: new")
        else:
            changes = _changes(before[name], after[name])
            lines += [f"{title}: {', '.join(changes)}"] if changes else []
    return lines


def _changes(before: Row, after: Row) -> list[str]:
    names = [name for name in {**before, **after} if name not in _NOT_COMPARED]
    return [
        f"{name} {_said(before.get(name))} -> {_said(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _said(value: Any) -> str:
    return _pairs(value) if isinstance(value, dict) else str(value)
