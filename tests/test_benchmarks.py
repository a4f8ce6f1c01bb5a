"""The benchmarks' registry, measuring and report; one real case through their own command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# the benchmarks are not installed with the package
sys.path.insert(0, str(ROOT))

from benchmarks import cases, end_to_end, measure, report  # noqa: E402
from benchmarks.micro import test_attention as attention  # noqa: E402
from benchmarks.micro import test_linear as linear  # noqa: E402
from benchmarks.micro import test_mlp as mlp  # noqa: E402
from fastvlm import __main__ as command  # noqa: E402
from fastvlm import ops  # noqa: E402

F32 = torch.float32


def test_names_are_unique_and_say_the_op() -> None:
    assert len(cases.CASES) == len(cases.ALL)
    assert {name.partition("-")[0] for name in cases.CASES} == {"linear", "mlp", "attention"}


def test_registry_holds_the_papers_shapes() -> None:
    wide = cases.CASES["mlp-gemma2-2b-3"]
    assert isinstance(wide, cases.MlpCase)
    assert (wide.width, wide.hidden, wide.gated) == (2304, 9216, True)
    # [3, 2304] x [9216, 2304], three times: the weights are nearly all of the bytes
    assert wide.bytes_moved(4) == 4 * (3 * 2304 * 9216 + 2 * 3 * 2304)
    shared = cases.CASES["attention-florence2-base-8x4"]
    assert isinstance(shared, cases.AttentionCase)
    assert (shared.rows, shared.keys, shared.heads, shared.head_dim) == (32, 594, 12, 64)
    assert shared.bytes_moved(2) == 2 * (2 * 8 * 594 * 768 + 2 * 32 * 768)
    head = cases.CASES["linear-florence2-base-head-1"]
    assert isinstance(head, cases.LinearCase)
    assert (head.inputs, head.outputs) == (768, 51289)


def test_tiny_cases_agree_with_their_baselines() -> None:
    small = cases.LinearCase("linear-tiny", 3, 17, 9, True)
    gelu = cases.MlpCase("mlp-tiny", 3, 17, 33, False)
    geglu = cases.MlpCase("mlp-tiny", 3, 17, 33, True)
    checked: list[tuple[measure.Operands, list[Callable[..., Any]]]] = [
        (linear.operands(small, F32, "cpu"), [ops.linear, torch.nn.functional.linear]),
        (mlp.operands(gelu, F32, "cpu"), [ops.gelu_mlp, mlp.gelu_eager]),
        (mlp.operands(geglu, F32, "cpu"), [ops.geglu_mlp, mlp.geglu_eager]),
    ]
    for softcap, heads in ((None, 4), (5.0, 2)):
        tiny = cases.AttentionCase("attention-tiny", 2, 3, 7, 4, heads, 8, softcap)
        checked.append(
            (attention.operands(tiny, F32, "cpu"), [*attention.functions(tiny).values()])
        )
    for operands, functions in checked:
        answers = [function(*operands) for function in functions]
        torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)


def test_rotation_uses_every_copy() -> None:
    seen: list[int] = []
    turn = measure.Rotation(seen.append, [(0,), (1,), (2,)])
    for _ in range(4):
        turn()
    assert sorted(seen[:3]) == [0, 1, 2]
    assert seen[3] == seen[0]
    measure.Rotation(seen.append, [(0,), (1,), (2,)], start=1)()
    assert seen[-1] != seen[0]


def test_record_compares_with_the_best_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "floor_seconds", lambda *_: 1e-3)
    case = cases.CASES["linear-florence2-base-q-1"]
    seconds = {"fastvlm": [0.002] * 3, "torch": [0.006] * 3, "other": [0.004] * 3}
    entry = measure.record(case, F32, "cpu", seconds)
    assert entry["ratio"] == 2.0
    assert entry["floor_share"]["fastvlm"] == 0.5
    assert entry["floor_us"] == 1000.0


def test_one_case_through_the_command_and_the_report(tmp_path: Path) -> None:
    options = [
        "-m",
        "pytest",
        "benchmarks/micro",
        "--benchmark-enable",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    case = ["-k", "linear-florence2-base-q-1", "--bench-rounds", "2", "--bench-out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *options, *case], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "micro-cpu-part.json").read_text())
    assert {entry["dtype"] for entry in figures["cases"]} == {"float32", "bfloat16"}
    assert set(figures) >= {"date", "machine", "versions", "stream_gb_per_s", "cases"}
    assert end_to_end.main(
        ["--small", "--beams", "2", "--new-tokens", "4", "--rounds", "1", "--out", str(tmp_path)]
    ) == 0  # fmt: skip
    page = report.write(tmp_path).read_text()
    assert "linear-florence2-base-q-1" in page
    assert "a tiny Florence-2" in page
    assert (tmp_path / "micro-cpu-part.svg").is_file()


def test_report_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert "make bench" in capsys.readouterr().err


def test_bench_without_a_checkout_says_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SOURCE", tmp_path)
    assert command.main(["bench"]) == 2
    assert "clone the repository" in capsys.readouterr().err
