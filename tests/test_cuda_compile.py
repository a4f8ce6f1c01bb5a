"""`python -m fastvlm compile --cuda`: what it reads, judges and compares."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_emulator
import pytest
import torch

from fastvlm import Layout, ops
from fastvlm.__main__ import main
from tools.compiling import cuda as compiling
from tools.compiling import cuda_kept as kept

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "cuda-compiled.json"
Row = dict[str, Any]


@pytest.fixture
def rows() -> list[Row]:
    return json.loads(RESULTS.read_text())["kernels"]


def test_what_is_kept_is_as_it_should_be(rows: list[Row]) -> None:
    assert compiling.wrong(rows) == []
    for arch in compiling.ARCHS:
        kernels = {row["kernel"] for row in rows if row["arch"] == arch}
        assert "attention_kernel<bf16, 256, true, ImageKeys>" in kernels
        assert len(kernels) == len(rows) / len(compiling.ARCHS)


FAULTS: dict[str, dict[str, Any]] = {
    "bytes of local memory": {"local": 8},
    "1 loads and": {"spill_loads": 1},
    "2 stores of it": {"spill_stores": 2},
    "does not fit": {"blocks": 0},
    "no instruction of the tensor cores": {"counts": {"LDSM": 1, "LDSM.T": 1, "LDGSTS.128": 1}},
    "no LDSM.T": {"counts": {"HMMA": 1, "LDSM": 1, "LDGSTS.128": 1}},
}


@pytest.mark.parametrize("words", FAULTS)
def test_what_is_wrong_is_said(words: str, rows: list[Row]) -> None:
    row = next(r for r in rows if r["kernel"].startswith("attention_kernel"))
    (line,) = compiling.wrong([{**row, **FAULTS[words]}])
    assert words in line


def test_differences(rows: list[Row]) -> None:
    changed = {**rows[1], "registers": rows[1]["registers"] + 1}
    new = {**rows[2], "kernel": "new"}
    lines = kept.differences(rows[:2], [changed, new])
    assert lines[0].endswith(": gone")
    assert f"registers {rows[1]['registers']} -> {rows[1]['registers'] + 1}" in lines[1]
    assert lines[2].endswith(": new")
    assert kept.differences(rows, rows) == []
    assert kept.differences(rows, [], only=["topk_merge"]) != []
    assert all("topk_merge" in line for line in kept.differences(rows, [], only=["topk_merge"]))


def test_counts_of_another_compiler_are_not_compared(tmp_path: Path) -> None:
    kept.save(tmp_path / "kept.json", "1.0", [])
    with pytest.raises(kept.KeptError, match=r"of nvcc 1\.0, this is 2\.0"):
        kept.load(tmp_path / "kept.json", "2.0")
    with pytest.raises(kept.KeptError, match="FileNotFoundError"):
        kept.load(tmp_path / "none.json", "2.0")


def test_without_nvcc_nothing_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["compile", "--cuda"]) == 2
    assert "nvcc is not on the PATH" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc (make test-cuda needs it)")
def test_a_kernel_that_spills_and_one_that_does_not_compile(tmp_path: Path) -> None:
    spilling = tmp_path / "spilling.cu"
    spilling.write_text(
        "__global__ void __launch_bounds__(1024, 2) topk_merge(float* x) {\n"
        "  float held[200], sum = 0;\n"
        "  #pragma unroll\n  for (int i = 0; i < 200; ++i) sum += held[i] = x[i * 1024];\n"
        "  #pragma unroll\n  for (int i = 0; i < 200; ++i) x[i * 1024] = held[i] * sum;\n}\n"
    )
    (row,) = compiling.compile_one(spilling, "sm_80")
    assert row["spill_stores"] > 0
    assert row["spill_loads"] > 0
    assert any("bytes of local memory" in line for line in compiling.wrong([row]))
    spilling.write_text("__global__ void unknown() {}\n")
    with pytest.raises(compiling.CompileError, match="launch_of does not know"):
        compiling.compile_one(spilling, "sm_80")
    spilling.write_text("__global__ void broken() { nothing; }\n")
    with pytest.raises(compiling.CompileError, match=r"spilling\.cu for sm_80:"):
        compiling.compile_one(spilling, "sm_80")


def _attention(d: int) -> Callable[[], Any]:
    q, k = torch.randn(1, 1, d).half(), torch.randn(9, 1, d).half()
    return lambda: ops.cross_attention(q, k, k, Layout.from_lengths([1], [9], [0]))


def _topk(rows: int) -> Callable[[], Any]:
    return lambda: ops.linear_topk(torch.randn(rows, 16).half(), torch.randn(64, 16).half(), 64)


def _norm(n: int) -> Callable[[], Any]:
    return lambda: ops.rms_norm(torch.randn(1, n), torch.randn(n))


def _geglu() -> Any:
    x, w = torch.randn(1, 16).half(), torch.randn(16, 16).half()
    return ops.geglu_mlp(x, w, w, w)


LAUNCHES: dict[str, Callable[[], Any]] = {
    **{f"attention_kernel<bf16, {d}, true, ImageKeys>": _attention(d) for d in (64, 96, 128, 256)},
    "topk_tiles_kernel<fp16, 2>": _topk(17),
    "topk_tiles_kernel<fp16, 4>": _topk(64),
    "few_rows_linear_kernel<fp16, fp16, 2>": _geglu,
    "rms_norm_kernel<float, 8>": _norm(2048),
    "rms_norm_kernel<float, 16>": _norm(6144),
}


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", LAUNCHES)
def test_launches_ask_for_what_the_table_says(kernel: str) -> None:
    with cuda_emulator.emulated(), torch.no_grad():
        cuda_emulator.reset_counts()
        LAUNCHES[kernel]()
    assert cuda_emulator.largest_launch() == compiling.launch_of(kernel)
