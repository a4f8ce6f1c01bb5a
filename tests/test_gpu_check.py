"""make gpu-check without a GPU: stand-ins for its parts show what becomes of one that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_check  # noqa: E402
from benchmarks.gpu_check import Part  # noqa: E402


def script(name: str, code: str, seconds: float = 30) -> Part:
    return Part(name, [sys.executable, "-c", code], seconds)


def test_every_part_runs_and_any_failure_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "report.md"
    steps = [
        script("tests", "print('1 failed'); raise SystemExit(3)"),
        script("models", "pass"),
        script("report", f"open({str(done)!r}, 'w').write('table')"),
    ]
    assert gpu_check.main([str(tmp_path)], steps) == 1
    assert done.read_text() == "table"
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {p["part"]: p["exit"] for p in found["parts"]} == {"tests": 3, "models": 0, "report": 0}
    assert "versions" in found
    out = capsys.readouterr().out
    assert "1 failed" in out
    assert "tests failed (exit code 3)" in out
    assert gpu_check.main([str(tmp_path)], steps[1:]) == 0


def test_a_part_that_takes_too_long_may_write_what_it_has(tmp_path: Path) -> None:
    done = tmp_path / "measured"
    code = (
        "import time\ntry: time.sleep(60)\n"
        f"except KeyboardInterrupt: open({str(done)!r}, 'w').close()"
    )
    slow = script("kernels", code, 2)
    assert gpu_check.main([str(tmp_path)], [slow]) == 1
    assert done.exists()
    (part,) = json.loads((tmp_path / "gpu-check.json").read_text())["parts"]
    assert part["exit"] is None
    assert part["seconds"] < 30


def test_the_parts_are_there_and_fit_into_ten_minutes(tmp_path: Path) -> None:
    parts = gpu_check.parts(tmp_path)
    assert [part.name for part in parts] == ["environment", "tests", "kernels", "models", "report"]
    assert sum(part.seconds for part in parts) <= 600
    tests = next(part for part in parts if part.name == "tests")
    assert "-n" in tests.command
    told = subprocess.run(
        ["make", "-n", "gpu-check", f"OUT={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert f'-m benchmarks.gpu_check "{tmp_path}"' in told
    assert "pip install --no-deps" in told
    assert "flash-attn" not in told
