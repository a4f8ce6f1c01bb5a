"""Compiled kernels as rows: the printed table, and all of them as a file."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastvlm import env
from fastvlm.tables import text_table
from tools.compiling.architectures import ARCHITECTURES
from tools.compiling.driver import Job, function
from tools.compiling.jobs import Origin
from tools.compiling.sources import digest
from tools.compiling.verdicts import Verdict, streams
from tools.compiling.work import Result

Row = dict[str, Any]
# what tells rows apart; everything else in a row is compared
KEY = ("kernel", "arch", "dtype", "config", "arguments")
NOT_COMPARED = (*KEY, "ops", "source")


def head(job: Job, origin: Origin) -> Row:
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
    found = head(job, origin)
    if counts is None:
        return {**found, "failure": result.failure.splitlines()[0]}
    programs, limit = ARCHITECTURES[job.arch].occupancy(counts.registers, counts.shared, job.warps)
    counted = dataclasses.asdict(counts)
    if not streams(job):
        del counted["loop_loads"]  # which no rule asks for
    found = {**found, **counted, "programs": programs, "limit": limit}
    found |= {"scalar_loads": result.scalar_loads, "dots": [list(dot) for dot in result.dots]}
    return found | ({"tensor_memory": result.tensor_memory} if result.tensor_memory else {})


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
    start = json.dumps({**env.stamp(), "triton": triton})[:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{start}, "kernels": [\n{lines}\n]}}\n')
