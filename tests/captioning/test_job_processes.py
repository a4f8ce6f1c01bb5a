"""The job in processes of its own: killed at any moment, beside others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import QUICK, fill, keys, run, texts

HERE = Path(__file__).parent
KILLS = int(os.environ.get("FASTVLM_TEST_KILLS", "3"))


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)},
        timeout=900,
        check=False,
    )


@pytest.mark.slow
def test_killed_at_any_moment_nothing_is_lost_or_twice(tmp_path: Path) -> None:
    """FASTVLM_TEST_KILLS=20 kills it more often."""
    folder = fill(tmp_path / "p", 12 * KILLS)
    options = ["--small", "--new-tokens", "4", "--lang", "en,de", "--batch-size", "2"]
    options += ["--beams", "2", "--quiet"]
    assert run(folder, tmp_path / "whole.jsonl", *options) == 0
    out = tmp_path / "o.jsonl"
    done = python(str(HERE / "killer.py"), str(folder), str(out), str(KILLS), *options)
    assert done.returncode == 0, done.stderr
    assert f"killed {KILLS} times" in done.stdout
    assert len(keys(out)) == len(set(keys(out))) == 2 * 12 * KILLS
    assert texts(out) == texts(tmp_path / "whole.jsonl")


@pytest.mark.slow
def test_two_processes_write_the_lines_of_one(tmp_path: Path) -> None:
    source = fill(tmp_path / "p", 9)
    (source / "bad.png").write_bytes(b"x")
    assert run(source, tmp_path / "one.jsonl") == 0
    out = tmp_path / "two.jsonl"
    # what a run of three processes left when it was killed is taken up
    part = Path(f"{out}.part-00002-of-00003")
    raw = (tmp_path / "one.jsonl").read_bytes().splitlines(keepends=True)
    part.write_bytes(raw[4] + raw[5][:30])
    done = python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastvlm",
        "caption", str(source), "--out", str(out), "--resume", *QUICK,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert texts(out) == texts(tmp_path / "one.jsonl")
    assert len(keys(out)) == len(set(keys(out)))
    assert sorted(path.name for path in tmp_path.glob("*.jsonl*")) == ["one.jsonl", "two.jsonl"]
