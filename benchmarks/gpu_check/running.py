"""A part is a process of its own with a limit; what it says is in a file, and all files in one
archive, which is written anew after each part: a run that is cut off has left what it knew."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm import env

# seconds that a part has to write what it has found, after it was told to stop
GRACE = 5.0
MOST = 16 * 2**20
# of the words of a part: more are those of one message over and over
WORDS = 2 * 2**20
LINES = 25


@dataclass(frozen=True)
class Part:
    """seconds: what it may take. elastic: and what parts before it have left of theirs.

    missing: why it cannot be done on this machine; it is left out, and said so.
    """

    name: str
    command: Sequence[str]
    seconds: float
    elastic: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None


def run(
    name: str, parts: Sequence[Part], out: Path, folder: Path, environment: Mapping[str, str]
) -> list[dict[str, Any]]:
    """All parts, in order; how each ended. folder: of the files, packed into out."""
    folder.mkdir(parents=True, exist_ok=True)
    start, found = time.monotonic(), []
    end = start + sum(part.seconds for part in parts)
    head = env.stamp()
    for number, part in enumerate(parts):
        later = sum(p.seconds for p in parts[number + 1 :])
        free = end - time.monotonic() - later
        seconds = free if part.elastic else min(part.seconds, free)
        found.append(_run(part, seconds, folder, environment))
        found[-1]["from"] = round(time.monotonic() - start - found[-1]["seconds"], 1)
        summary = json.dumps({**head, "command": name, "parts": found}, indent=1) + "\n"
        for place in (folder, out):
            (place / f"gpu-check-{name}.json").write_text(summary)
        pack(folder, out / f"gpu-check-{name}.tar.gz")
    return found


def _run(
    part: Part, seconds: float, folder: Path, environment: Mapping[str, str]
) -> dict[str, Any]:
    if part.missing is not None:
        print(f"gpu-check: {part.name} is left out: {part.missing}", flush=True)
        return {"part": part.name, "left_out": part.missing, "seconds": 0.0}
    print(f"gpu-check: {part.name}, at most {seconds:.0f} s", flush=True)
    file = folder / f"{part.name}.txt"
    start = time.monotonic()
    with file.open("w") as words:
        try:
            # in a group of its own: pytest's workers are told to stop as well
            process = subprocess.Popen(
                part.command, stdout=words, stderr=subprocess.STDOUT, start_new_session=True,
                env={**environment, **part.environment}, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:
            words.write(f"{error}\n")
            status: int | None = 127
        else:
            status = _status(process, max(seconds - GRACE, 1.0))
    took = round(time.monotonic() - start, 1)
    with file.open(errors="replace") as words:
        last = words.read().splitlines()[-LINES:]
    print("\n".join([*last, f"gpu-check: {part.name}: {ended(status)}, {took} s"]), flush=True)
    return {"part": part.name, "exit": status, "seconds": took}


def ended(status: int | None) -> str:
    return "took too long" if status is None else f"exit code {status}"


def _status(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """None where its time was up."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    except KeyboardInterrupt:
        _tell(process, signal.SIGKILL)
        raise
    # as Ctrl-C does, so that what was measured is written
    _tell(process, signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        _tell(process, signal.SIGKILL)
        process.wait()
    return None


def _tell(process: subprocess.Popen[bytes], what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, what)


def pack(folder: Path, archive: Path, most: int = MOST) -> None:
    """folder in one archive of at most so many bytes: results first, then the shorter words; what
    does not fit is left out, by name."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    order = (".json", ".md", ".txt")
    files.sort(key=lambda file: (
        order.index(file.suffix) if file.suffix in order else len(order), file.stat().st_size,
    ))  # fmt: skip
    left_out: list[str] = []
    while True:
        data = _packed(folder, files, left_out)
        if len(data) <= most or not files:
            break
        gone = files.pop()
        left_out.append(f"{gone.relative_to(folder)}: {gone.stat().st_size} bytes")
    whole = archive.with_suffix(".part")
    whole.write_bytes(data)
    whole.replace(archive)


def _packed(folder: Path, files: Sequence[Path], left_out: Sequence[str]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", compresslevel=6) as archive:
        for file in files:
            text = file.read_bytes()
            if file.suffix == ".txt" and len(text) > WORDS:
                half = WORDS // 2
                text = text[:half] + b"\n[... left out ...]\n" + text[-half:]
            _add(archive, f"{folder.name}/{file.relative_to(folder)}", text)
        if left_out:
            text = "\n".join([*left_out, ""]).encode()
            _add(archive, f"{folder.name}/left-out.txt", text)
    return data.getvalue()


def _add(archive: tarfile.TarFile, name: str, text: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = len(text), int(time.time())
    archive.addfile(entry, io.BytesIO(text))
