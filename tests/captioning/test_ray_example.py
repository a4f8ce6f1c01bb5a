"""examples/caption_on_ray.py in Ray's local mode: the lines that one process writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from folders import fill, lines

from fastvlm.__main__ import main

pytest.importorskip("ray", reason="ray is not installed")
OPTIONS = ["--small", "--quiet"]
EXAMPLE = Path(__file__).parents[2] / "examples/caption_on_ray.py"


@pytest.mark.slow
def test_two_workers_write_the_lines_of_one_process(tmp_path: Path) -> None:
    source = fill(tmp_path / "p", 9)
    (source / "bad.png").write_bytes(b"x")
    assert main(["caption", str(source), "--out", str(tmp_path / "one.jsonl"), *OPTIONS]) == 0
    out = tmp_path / "two"
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(source), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line for file in sorted(out.iterdir()) for line in lines(file)]
    assert sorted(map(text, found)) == sorted(map(text, lines(tmp_path / "one.jsonl")))
    assert sum("error" in line for line in found) == 1


def text(line: dict[str, Any]) -> str:
    """What a line says; a score may differ in its last bits with what decoded beside it."""
    return json.dumps({name: line[name] for name in line if name != "score"}, sort_keys=True)
