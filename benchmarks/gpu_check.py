"""All that `make gpu-check` does, each part whatever became of the ones before it.

``python -m benchmarks.gpu_check FOLDER``: the op tests and the benchmarks on a CUDA device, then
tables, JSON and SVG of whatever was measured, and gpu-check.json, which says how each part ended.
The exit code is 1 where any of them failed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastvlm import env

# tests share one GPU, but most of their time is Python's and the compiler's
WORKERS = min(12, os.cpu_count() or 1)
# seconds that a part has to write what it has found, after it was told to stop
GRACE = 20.0


class Part(NamedTuple):
    """seconds: what it may take; all parts together stay below ten minutes."""

    name: str
    command: Sequence[str]
    seconds: float


def parts(folder: Path) -> list[Part]:
    module, out = (sys.executable, "-m"), str(folder)
    tests = ["pytest", "-m", "gpu", "-n", str(WORKERS), f"--junitxml={folder / 'gpu-tests.xml'}"]
    kernels = ["pytest", "benchmarks/micro", "--benchmark-enable", "-q", "--bench-device", "cuda"]
    models = ["benchmarks.end_to_end", "--device", "cuda", "--out", out]
    return [
        Part("environment", [*module, "fastvlm", "env"], 30),
        Part("tests", [*module, *tests], 210),
        Part("kernels", [*module, *kernels, "--bench-rounds", "5", "--bench-out", out], 210),
        Part("models", [*module, *models, "--rounds", "2"], 100),
        Part("report", [*module, "benchmarks.report", out], 30),
    ]


def run(part: Part, folder: Path) -> dict[str, Any]:
    """The part's exit status, None where its time was up. Its words go to the screen and a file."""
    print(f"gpu-check: {part.name}", flush=True)
    start = time.monotonic()
    with (folder / f"gpu-{part.name}.txt").open("w") as words:
        # in a group of its own: pytest's workers are told to stop as well
        process = subprocess.Popen(
            part.command, stdout=words, stderr=subprocess.STDOUT, start_new_session=True
        )
        status = _status(process, part.seconds)
    print("\n".join((folder / f"gpu-{part.name}.txt").read_text().splitlines()[-30:]), flush=True)
    return {"part": part.name, "exit": status, "seconds": round(time.monotonic() - start, 1)}


def _status(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        # as Ctrl-C does, so that what was measured is written
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None


def main(argv: Sequence[str], steps: Sequence[Part] | None = None) -> int:
    folder = Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    found = [run(part, folder) for part in (parts(folder) if steps is None else steps)]
    (folder / "gpu-check.json").write_text(
        json.dumps({**env.stamp(), "parts": found}, indent=1) + "\n"
    )
    failed = [part for part in found if part["exit"] != 0]
    for part in failed:
        ended = "took too long" if part["exit"] is None else f"exit code {part['exit']}"
        print(f"gpu-check: {part['part']} failed ({ended}): {folder}/gpu-{part['part']}.txt")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
