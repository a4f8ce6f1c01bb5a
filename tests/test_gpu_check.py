"""gpu-check without a GPU: stand-ins for its parts show what becomes of one that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_check import machine, ops, parts, place, report, running  # noqa: E402
from benchmarks.gpu_check.__main__ import main  # noqa: E402
from benchmarks.gpu_check.running import Part  # noqa: E402


def script(name: str, code: str, seconds: float = 30, **more: object) -> Part:
    return Part(name, [sys.executable, "-c", code], seconds, **more)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTVLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "out"


def packed(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as files:
        return {m.name.partition("/")[2]: files.extractfile(m).read() for m in files.getmembers()}


def test_every_part_runs_and_any_failure_is_one(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        script("tests", "print('1 failed'); raise SystemExit(3)"),
        Part("memcheck", ["no such tool"], 30, missing="compute-sanitizer is not here"),
        Part("broken", ["/no/such/tool"], 30),
        script("models", "pass"),
    ]
    assert main([str(out), "correctness"], steps) == 1
    words = capsys.readouterr().out
    assert "1 failed" in words
    assert "tests failed (exit code 3)" in words
    assert "memcheck left out: compute-sanitizer is not here" in words
    assert "1 of 4 parts done" in words
    files = packed(out / "gpu-check-correctness.tar.gz")
    assert files["tests.txt"] == b"1 failed\n"
    found = json.loads(files["gpu-check-correctness.json"])
    assert [part.get("exit", part.get("left_out")) for part in found["parts"]] == [
        3, "compute-sanitizer is not here", 127, 0,
    ]  # fmt: skip
    assert "versions" in found
    assert main([str(out), "timings"], steps[3:]) == 0
    assert {path.name for path in out.iterdir()} == {
        f"gpu-check-{command}.{kind}"
        for command in parts.COMMANDS
        for kind in ("json", "tar.gz")
    }  # fmt: skip


def test_a_part_that_takes_too_long_may_write_what_it_has(out: Path) -> None:
    code = (
        "import os, time\nprint('begun', flush=True)\ntry: time.sleep(60)\n"
        "except KeyboardInterrupt: print('measured')"
    )
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    assert main([str(out), "timings"], [script("kernels", code, 8), script("deaf", deaf, 7)]) == 1
    files = packed(out / "gpu-check-timings.tar.gz")
    assert files["kernels.txt"] == b"begun\nmeasured\n"
    found = json.loads(files["gpu-check-timings.json"])["parts"]
    assert [part["exit"] for part in found] == [None, None]
    assert sum(part["seconds"] for part in found) < 25


def test_what_parts_leave_of_their_time_is_of_the_elastic_one(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [script("a", "", 100), script("b", "", 10, elastic=True), script("c", "", 20)]
    assert main([str(out), "correctness"], steps) == 0
    limits = {
        line.split()[1].rstrip(","): float(line.split()[-2])
        for line in capsys.readouterr().out.splitlines()
        if "at most" in line
    }
    assert limits["a"] == 100
    assert 70 < limits["b"] <= 110
    assert limits["c"] == 20


def test_what_is_packed_fits(tmp_path: Path) -> None:
    folder = tmp_path / "correctness"
    folder.mkdir()
    (folder / "found.json").write_text("{}")
    (folder / "short.txt").write_text("words")
    (folder / "tests.txt").write_bytes(b"first" + b"x" * 2 * running.WORDS + b"last")
    (folder / "large.bin").write_bytes(os.urandom(300_000))
    running.pack(folder, tmp_path / "all.tar.gz", most=100_000)
    assert (tmp_path / "all.tar.gz").stat().st_size <= 100_000
    files = packed(tmp_path / "all.tar.gz")
    assert files["found.json"] == b"{}"
    assert files["short.txt"] == b"words"
    assert files["left-out.txt"] == b"large.bin: 300000 bytes\n"
    assert files["tests.txt"].startswith(b"first")
    assert files["tests.txt"].endswith(b"last")
    assert len(files["tests.txt"]) < running.WORDS + 100


@pytest.mark.parametrize("command", parts.COMMANDS)
def test_the_parts_are_there_and_fit_into_five_minutes(command: str, tmp_path: Path) -> None:
    made = parts.of(command, tmp_path)
    assert [part.name for part in made] == {
        "correctness": ["environment", "build", "first", "memcheck", "racecheck", "tests",
                        "models"],
        "timings": ["environment", "ops", "models", "training", "report"],
    }[command]  # fmt: skip
    assert sum(part.seconds for part in made) <= parts.SECONDS < 300
    for name in (parts.FIRST, parts.MODELS):
        assert (ROOT / name).is_file()


def test_a_checked_part_is_our_kernels_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.shutil, "which", lambda *args, **kwargs: "/bin/compute-sanitizer")
    part = next(p for p in parts.of("correctness", tmp_path) if p.name == "racecheck")
    assert part.missing is None
    told = " ".join(part.command)
    assert told.startswith("/bin/compute-sanitizer --tool racecheck --kernel-name kns=fastvlm")
    assert "--error-exitcode 99" in told
    assert part.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_a_cache_that_cannot_be_written_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("FASTVLM_CACHE_DIR", str(file / "below"))
    found = place.environment(tmp_path / "out")
    for name in ("FASTVLM_CACHE_DIR", "TRITON_CACHE_DIR", "TMPDIR", "HF_HOME"):
        assert Path(found[name]).is_relative_to(tmp_path / "out" / "cache")
        assert Path(found[name]).is_dir()


def test_without_a_gpu_nothing_is_checked(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([str(out)]) == 2
    assert "nothing was checked" in capsys.readouterr().err
    assert not out.exists()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert any(line.startswith("ttsem is not installed") for line in machine.missing())
    assert len(machine.missing()) == len(machine.OPTIONAL)


def test_the_cases_are_known() -> None:
    assert len({case.name for case in ops.wanted()}) == len(ops.ORDER)


def test_a_side_that_fails_or_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.gpu_check import sides

    case = ops.small(next(c for c in ops.wanted() if c.name == "norm-rms_norm-2304-2304"))
    of = sides.work(case, torch.bfloat16, "cpu")

    def raising(*_: object) -> None:
        raise RuntimeError("no kernel for this\nand more")

    planted = {
        "eager": of.functions()["eager"],
        "wrong": lambda x, w: x,
        "raising": raising,
        "fastvlm": of.functions()["fastvlm"],
    }
    monkeypatch.setattr(sides, "work", lambda *_: sides.Work(case, of.operands, lambda: planted))
    limits = {"copy_bytes_per_s": 1e9, "bf16_flop_per_s": 1e9}
    found = ops.measured(case, torch.bfloat16, "cpu", False, limits, lambda: 60.0)
    assert set(found["call_us"]) == {"eager", "fastvlm"}
    assert found["failed"]["raising"] == "RuntimeError: no kernel for this"
    assert "of the largest value apart" in found["failed"]["wrong"]


def test_the_page_says_what_was_not_measured(tmp_path: Path) -> None:
    assert "ops: not measured." in report.write(tmp_path).read_text()


@pytest.mark.slow
@pytest.mark.turns(6)
def test_a_share_of_the_tests_and_what_a_gpu_would_run(tmp_path: Path) -> None:
    def collected(*arguments: str) -> set[str]:
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "tests/ops/test_rope.py", *arguments],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return {line for line in done.stdout.splitlines() if "::" in line}

    full = collected("-m", "triton", "--triton", "full")
    half = collected("-m", "triton", "--triton", "full", "--share", "0/2")
    assert half < full
    assert half == {test for test in full if zlib.crc32(test.encode()) % 2 == 0} != set()
    assert collected("-m", "gpu", "--as-on-gpu", "--spread") == full
