"""The benchmarks' registry, measuring and report; one real case through their own command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# the benchmarks are not installed with the package
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    cases,
    end_to_end,
    kinds,
    measure,
    report,
    targets,
)
from fastvlm import __main__ as command  # noqa: E402

F32 = torch.float32


def test_names_are_unique_and_say_the_op() -> None:
    assert len(cases.CASES) == len(cases.ALL)
    ops_named = {"linear", "mlp", "attention", "norm", "rope", "loss", "vision"}
    assert {name.partition("-")[0] for name in cases.CASES} == ops_named


def test_registry_holds_the_papers_shapes() -> None:
    wide = cases.CASES["mlp-gemma2-2b-3"]
    assert isinstance(wide, kinds.MlpCase)
    assert (wide.width, wide.hidden, wide.gated) == (2304, 9216, True)
    # [3, 2304] x [9216, 2304], three times: the weights are nearly all of the bytes
    assert wide.bytes_moved(4) == 4 * (3 * 2304 * 9216 + 2 * 3 * 2304)
    shared = cases.CASES["attention-florence2-base-8x4"]
    assert isinstance(shared, kinds.AttentionCase)
    assert (shared.rows, shared.keys, shared.heads, shared.head_dim) == (32, 594, 12, 64)
    assert shared.bytes_moved(2) == 2 * (2 * 8 * 594 * 768 + 2 * 32 * 768)
    head = cases.CASES["linear-florence2-base-head-1"]
    assert isinstance(head, kinds.LinearCase)
    assert (head.inputs, head.outputs) == (768, 51289)


def test_training_shapes() -> None:
    self_attention = cases.CASES["attention-train-self-gemma2-2b"]
    assert isinstance(self_attention, kinds.CaptionsCase)
    assert len(self_attention.lengths) == 48
    assert min(self_attention.lengths) >= 10
    assert max(self_attention.lengths) <= 128
    tiny = kinds.CaptionsCase("tiny", 1, (2, 3), None, 2, 1, 4, None)
    # rows see 1 + 2 and 1 + 2 + 3 keys; six products of 2 flops
    assert tiny.flops == 6 * 2 * 9 * 2 * 4
    assert tiny.bytes_moved(4) == 4 * (5 * 5 * 2 * 4 + 3 * 2 * 5 * 4)


def test_rounds_follow_the_seconds_of_one() -> None:
    assert measure.rounds_for(15, 0.1) == 15
    assert measure.rounds_for(15, 1e-4) == 150
    assert measure.rounds_for(15, 30.0) == 3
    assert measure.rounds_for(2, 30.0) == 2


def test_targets_name_cases_and_are_computed() -> None:
    for target in targets.TARGETS:
        for name in target.cases:
            assert target.dtype in cases.CASES[name].dtypes
    missing = targets.outcomes([])
    assert all(outcome.met is None for outcome in missing)

    def entry(name: str, ours: float, **more: Any) -> dict[str, Any]:
        medians = {"fastvlm": ours, "torch": 12.0, "onnxruntime": 5.0, "openvino": 4.0}
        return {"case": name, "dtype": "float32", "median_us": medians, **more}

    rows = (1, 3, 4, 8, 16, 32)
    found = [entry(f"mlp-gemma2-2b-{n}", 2.0, floor_share={"fastvlm": 0.9}) for n in rows]
    found[1] = entry("mlp-gemma2-2b-3", 6.0, floor_share={"fastvlm": 0.5})
    sizes = {"bytes": 1.0, "baseline_bytes": 4.0}
    memories = {"extra_memory_mib": {"eager": 100.0, "fastvlm": 7.0}}
    found += [entry(name, 2.0, **sizes) for name in targets.outcomes([])[9].target.cases]
    found += [entry("loss-256000", 2.0, **memories)]
    outcomes = {
        (o.target.work, o.target.measure, o.target.against): o
        for o in targets.outcomes(found)
        if o.target.dtype == "float32"
    }
    mlp_name = "GeGLU MLP of Gemma-2-2B"
    worst = outcomes[f"{mlp_name}, 3 to 16 rows", targets.FASTER, ("torch",)]
    assert (worst.measured, worst.case, worst.met) == (2.0, "mlp-gemma2-2b-3", False)
    best_engine = outcomes[
        f"{mlp_name}, 8 and 16 rows", targets.FASTER, ("onnxruntime", "openvino")
    ]
    assert (best_engine.measured, best_engine.met) == (2.0, True)
    assert [o.met for o in outcomes.values() if o.target.measure == targets.FLOOR] == [False]
    assert [o.measured for o in outcomes.values() if o.target.measure == targets.BYTES] == [0.25]
    assert [o.met for o in outcomes.values() if o.target.measure == targets.MEMORY] == [False]


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
    monkeypatch.setattr(measure, "floor_seconds", lambda *_: (1e-3, "bytes"))
    case = cases.CASES["linear-florence2-base-q-1"]
    seconds = {"fastvlm": [0.002] * 3, "torch": [0.006] * 3, "other": [0.004] * 3}
    entry = measure.record(case, F32, "cpu", seconds, bandwidth=1e9)
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
    # pytest-benchmark measures nothing in what it takes for a worker of xdist
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, *options, *case],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=alone,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "micro-cpu-part.json").read_text())
    assert {entry["dtype"] for entry in figures["cases"]} == {"float32", "bfloat16"}
    assert set(figures) >= {
        "date",
        "machine",
        "versions",
        "stream_gb_per_s",
        "missing_baselines",
        "cases",
    }
    assert end_to_end.main(
        ["--small", "--beams", "2", "--new-tokens", "4", "--rounds", "1", "--out", str(tmp_path)]
    ) == 0  # fmt: skip
    page = report.write(tmp_path).read_text()
    assert "linear-florence2-base-q-1" in page
    assert "not measured" in page
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
