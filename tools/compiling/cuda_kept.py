"""Counts of compiled CUDA kernels in a file, and what has changed since."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastvlm import env

Row = dict[str, Any]


class KeptError(ValueError):
    """The file cannot be compared with."""


def save(path: Path, nvcc: str, rows: Sequence[Row]) -> None:
    """One line for each row, so that a change shows in a diff as what changed."""
    head = json.dumps({**env.stamp(), "nvcc": nvcc})[:-1]
    lines = ",\n".join(map(json.dumps, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head}, "kernels": [\n{lines}\n]}}\n')


def load(path: Path, nvcc: str) -> list[Row]:
    try:
        kept = json.loads(path.read_text())
        rows: list[Row] = kept["kernels"]
    except (OSError, ValueError, KeyError) as error:
        raise KeptError(f"--check {path}: {type(error).__name__}: {error}") from None
    if kept["nvcc"] != nvcc:
        raise KeptError(
            f"--check {path}: its counts are of nvcc {kept['nvcc']}, this is {nvcc}; nothing was "
            "compared"
        )
    return rows


def differences(before: Iterable[Row], now: Iterable[Row], only: Sequence[str] = ()) -> list[str]:
    """A line for each kernel that is not as it was, gone or new."""
    old = {
        (row["kernel"], row["arch"]): row
        for row in before
        if not only or any(word in row["kernel"] for word in only)
    }
    new = {(row["kernel"], row["arch"]): row for row in now}
    lines = []
    for key in sorted({*old, *new}):
        title = "  ".join(key)
        if key not in new:
            lines.append(f"{title}: gone")
        elif key not in old:
            lines.append(f"{title}: new")
        elif old[key] != new[key]:
            changes = (
                f"{name} {old[key].get(name)} -> {new[key].get(name)}"
                for name in {**old[key], **new[key]}
                if old[key].get(name) != new[key].get(name)
            )
            lines.append(f"{title}: {', '.join(changes)}")
    return lines
