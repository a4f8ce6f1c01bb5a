"""`python -m fastvlm compile`: it goes through every config and finds what was planted."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastvlm import triton as backend
from fastvlm.__main__ import main
from fastvlm.triton import configs
from tools.compiling import work
from tools.compiling.architectures import DEFAULT
from tools.compiling.verdicts import Excepted, judge

ROOT = Path(__file__).resolve().parent.parent


def test_exit_codes_and_words_of_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "--arch", "sm_91"]) == 2
    assert "sm_91; there are sm_80, " in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["compile"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastvlm compile: triton is not installed")
    assert err.count("\n") == 1


def test_every_op_with_a_launcher_has_calls() -> None:
    from tools.calls import CALLS

    assert [op for names in backend.FLOORS.values() for op in names if op not in CALLS] == []


def test_calls_fit_the_schemas_of_their_ops() -> None:
    from tools.calls import CALLS

    for op, calls in CALLS.items():
        for _, build in calls:
            with FakeTensorMode():
                getattr(torch.ops.fastvlm, op).default(*build(torch.bfloat16))


def test_every_config_that_a_table_may_choose_is_reached_by_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from tools.compiling import jobs

    keys, launch = [], configs.launch

    def noted(kernel: str, x: torch.Tensor, run: Any, **key: int) -> None:
        keys.append((kernel, key))
        launch(kernel, x, run, **key)

    monkeypatch.setattr(configs, "launch", noted)
    # what a case is chosen by does not depend on the architecture
    assert jobs.record(["sm_90"], first_only=True).faults == []
    for family in configs.FAMILIES:
        assert _unreached(family, keys) == []
    fewer = [(kernel, key) for kernel, key in keys if kernel != "geglu_backward"]
    assert len(_unreached("sm90", fewer)) == 10


def test_a_persistent_grid_is_as_large_as_the_device_holds(
    compiled: dict[str, work.Result],
) -> None:
    """The tables say how many programs share a multiprocessor, and the counts agree."""
    result = compiled["product"]
    assert result.counts is not None
    config = next(
        config
        for case in configs.table("sm90")["geglu_forward"]
        for config in case.configs
        if config.resident == 2
    )
    blocks = " ".join(f"{name}={value}" for name, value in config.blocks.items())
    text = f"PERSISTENT=1 {blocks} warps={config.num_warps} stages={config.num_stages}"
    few = dataclasses.replace(result.job, kernel="geglu_forward")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(few), "config", text)
        patch.setattr(type(few), "warps", config.num_warps)
        for registers, words in ((128, ""), (168, "1 programs share a multiprocessor")):
            counts = dataclasses.replace(result.counts, registers=registers, shared=0)
            found = judge([dataclasses.replace(result, job=few, counts=counts)])
            said = [v.words for v in found if v.rule == "resident"]
            assert [words in line for line in said] == ([True] if words else [])
        patch.setattr(type(few), "config", text.replace("stages=", "stages=9"))
        found = judge([dataclasses.replace(result, job=few)])
        assert ["its table says []" in v.words for v in found if v.rule == "resident"] == [True]


def test_what_is_kept_spills_nowhere_and_is_small() -> None:
    path = ROOT / "benchmarks/results/triton-compiled.json"
    assert path.stat().st_size < 300_000
    pytest.importorskip("triton")
    from tools.compiling import summary

    version, entries = summary.load(path)
    assert version.startswith("3.")
    assert {arch for _, arch in entries} == set(DEFAULT)
    assert [place for place, entry in entries.items() if entry.spilled] == []
    assert all(entry.rows for entry in entries.values())


def _unreached(family: str, keys: list[tuple[str, dict[str, int]]]) -> list[str]:
    """The configs of a family that no launch with these keys may get."""
    table = configs.table(family)
    reached = {
        (kernel, next(i for i, case in enumerate(table[kernel]) if case.when(**key)))
        for kernel, key in keys
    }
    return [
        f"{kernel}, case {i}: {config}"
        for kernel, cases in table.items()
        for i, case in enumerate(cases)
        if (kernel, i) not in reached
        for config in case.configs
    ]


def _planted(name: str) -> Any:
    pytest.importorskip("triton", reason="triton is not installed (make test-triton installs it)")
    return getattr(importlib.import_module("planted"), name)


def _launched(arch: str, launch: Callable[[Any], None], name: str) -> Any:
    kernel = _planted(name)
    from tools.compiling.driver import recording

    with recording(arch) as launches:
        launch(kernel)
    return launches[0]


@pytest.fixture(scope="module")
def compiled() -> dict[str, work.Result]:
    """The planted kernels, each compiled once."""
    x = torch.empty(8192, dtype=torch.bfloat16)
    product = {"M": 64, "N": 64, "K": 64, "num_warps": 4}
    jobs = {
        "copy": _launched("sm_90", lambda k: k[(1,)](x, x, 8192, BLOCK=1024), "copy"),
        "copy on AMD": _launched("gfx942", lambda k: k[(1,)](x, x, 8192, BLOCK=2048), "copy"),
        "narrow": _launched("sm_90", lambda k: k[(1,)](x, x, BLOCK=1024), "narrow"),
        "spilling": _launched(
            "sm_90", lambda k: k[(1,)](x, x, BLOCK=4096, num_warps=1, maxnreg=32), "spilling"
        ),
        "broken": _launched("sm_90", lambda k: k[(1,)](x), "broken"),
        "product": _launched("sm_90", lambda k: k[(1,)](x, x, x, **product), "product"),
        "small product": _launched(
            "sm_90", lambda k: k[(1,)](x, x, x, **{**product, "M": 16}), "product"
        ),
    }
    return dict(zip(jobs, work.compile_all(list(jobs.values()))))


def test_a_clean_kernel_is_counted_and_accepted(compiled: dict[str, work.Result]) -> None:
    for name, arch in (("copy", "sm_90"), ("copy on AMD", "gfx942")):
        result = compiled[name]
        assert result.failure == ""
        counts = result.counts
        assert counts is not None
        assert result.job.arch == arch
        assert 4 <= counts.registers <= 40
        assert counts.loads == counts.stores == {"128": 1}
        assert 15 < counts.instructions < 100
        assert (counts.local, counts.loop, counts.tensor) == (0, 0, {})
        assert judge([result]) == []
    config = compiled["copy"].job.config
    assert config.startswith("BLOCK=1024 warps=4")
    assert compiled["copy"].job.arguments == "*bf16/16 *bf16/16 i32/16"


def test_planted_faults_are_found(compiled: dict[str, work.Result]) -> None:
    rules = {name: [v.rule for v in judge([result])] for name, result in compiled.items()}
    assert rules == {
        "copy": [],
        "copy on AMD": [],
        "narrow": ["wide loads"],
        "spilling": ["spills"],
        "broken": ["compiles"],
        "product": [],
        # of which it is said that it has no HGMMA, and why that is no fault
        "small product": ["tensor cores"],
    }
    (small,) = judge([compiled["small product"]])
    assert small.words == "no HGMMA: tiles of 16 rows, by HMMA"
    assert small.exception.startswith("a warpgroup's product has 64 rows")
    assert "planted" in judge([compiled["broken"]])[0].words
    assert "of 16 bits" in judge([compiled["narrow"]])[0].words


def test_products_use_the_tensor_cores(compiled: dict[str, work.Result]) -> None:
    large, small = compiled["product"], compiled["small product"]
    assert large.counts is not None
    assert small.counts is not None
    assert set(large.counts.tensor) == {"HGMMA"}
    assert set(small.counts.tensor) == {"HMMA"}
    assert (large.dots, small.dots) == (((64, 16),), ((16, 16),))
    large.counts.tensor, kept = {"HMMA": 8}, large.counts.tensor
    try:
        assert "instead of HGMMA" in judge([large])[0].words
        large.counts.tensor = {}
        assert "without an instruction" in judge([large])[0].words
    finally:
        large.counts.tensor = kept


def test_a_weight_is_streamed_by_128_bits(compiled: dict[str, work.Result]) -> None:
    """Of a product of few rows, by a kernel that a decoding step waits for."""
    result = compiled["product"]
    assert result.counts is not None
    config = result.job.config
    few = dataclasses.replace(result.job, kernel="low_precision_linear")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(few), "config", f"{config} BLOCK_M=16")
        for width, words in (("64", "narrow loads in the loop: 4 of 64 bits"), ("128", "")):
            counts = dataclasses.replace(result.counts, loop_loads={width: 4})
            found = judge([dataclasses.replace(result, job=few, counts=counts)])
            assert [v.words for v in found] == ([words] if words else [])
        patch.setattr(type(few), "config", f"{config} BLOCK_M=128")
        counts = dataclasses.replace(result.counts, loop_loads={"64": 4})
        assert judge([dataclasses.replace(result, job=few, counts=counts)]) == []


def test_too_much_shared_memory_is_found(compiled: dict[str, work.Result]) -> None:
    counts = compiled["copy"].counts
    assert counts is not None
    counts.shared, kept = 228 * 1024, counts.shared
    try:
        assert [v.rule for v in judge([compiled["copy"]])] == ["fits"]
    finally:
        counts.shared = kept


def test_an_exception_keeps_its_reason(compiled: dict[str, work.Result]) -> None:
    pytest.importorskip("triton")
    from tools.compiling import report

    excepted = Excepted("wide loads", "narrow", "sm_*", "planted so")
    found = judge([compiled["narrow"]], [excepted])
    assert [v.exception for v in found] == ["planted so"]
    assert "planted so" in report.verdicts(found)
    assert "wrong" not in report.verdicts(found)


def test_the_driver_leaves_pytorch_and_triton_as_they_were() -> None:
    _planted("copy")
    from triton import knobs
    from triton.runtime.driver import driver as drivers

    before = (torch.cuda.is_available(), torch.cuda.device_count(), drivers._active)
    x = torch.empty(64)
    job = _launched("sm_80", lambda k: k[(1,)](x, x, 64, BLOCK=64), "copy")
    again = _launched("sm_90", lambda k: k[(1,)](x, x, 64, BLOCK=64), "copy")
    assert job.data != again.data, "the second architecture was served with the first's"
    assert (torch.cuda.is_available(), torch.cuda.device_count(), drivers._active) == before
    assert knobs.runtime.jit_cache_hook is None
    assert "triton" not in backend.CANDIDATES["CPU"]


def test_a_launcher_that_asks_for_a_value_is_at_fault() -> None:
    _planted("copy")
    from tools.compiling.driver import Fault, recording

    with recording("sm_90"), pytest.raises(Fault, match="asks for a value"):
        torch.empty(4).sum().item()
    with recording("sm_90"):
        # as large as in training, and at once: nothing is multiplied
        assert torch.mm(torch.empty(4096, 65536), torch.empty(65536, 9216)).shape == (4096, 9216)


def test_each_option_of_a_table_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that takes its config from a table is recorded with each of them, once."""
    kernel = _planted("copy")
    from fastvlm.ops import dispatch
    from tools.compiling import jobs

    def run(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        configs.launch("planted", x, lambda c: kernel[(1,)](x, x, 64, **c.arguments))
        return x

    table = {"planted": [configs.Case([configs.Config({"BLOCK": b}) for b in (16, 32, 64)])]}
    monkeypatch.setattr(configs, "table", lambda name: table)
    stub = dispatch.Kernel("triton", run, lambda: None, lambda *args: None)
    monkeypatch.setitem(dispatch.OPS["rope"].kernels, "triton", stub)
    monkeypatch.setattr(backend, "FLOORS", {"rope": ("rope",)})
    configs._options.cache_clear()
    try:
        recorded = jobs.record(["sm_90"])
    finally:
        configs._options.cache_clear()
    assert recorded.faults == []
    blocks = [job.config.partition(" ")[0] for job in sorted(recorded.jobs)]
    assert sorted(blocks) == sorted(f"BLOCK={b}" for b in (16, 32, 64) for dtype in range(3))


def test_a_digest_is_of_code_alone() -> None:
    _planted("copy")
    from triton.runtime.jit import JITFunction

    from fastvlm.triton.kernels import mlp
    from tools.compiling.sources import digest

    def changed(old: str, new: str) -> str:
        """Of a caller whose callee has another line."""
        kernel = JITFunction(mlp._tile.fn)
        assert old in kernel.src
        kernel._unsafe_update_src(kernel.src.replace(old, new))
        caller = JITFunction(mlp.geglu_backward.fn)
        caller.__globals__ = {**caller.__globals__, "_tile": kernel}
        return digest(caller)

    now = digest(mlp.geglu_backward)
    assert changed("across = GROUP", "across = GROUP") == now
    assert changed("across = GROUP", "# a comment\n    across = GROUP") == now
    assert changed("across = GROUP", "across = 2 * GROUP") != now


def test_a_summary_tells_what_differs() -> None:
    pytest.importorskip("triton")
    from tools.compiling import summary

    def row(number: int, **changed: Any) -> dict[str, Any]:
        made = {"kernel": "k", "arch": "sm_90", "dtype": "bf16", "config": f"BLOCK={number}",
                "arguments": "*bf16", "ops": ["op"], "source": "s", "registers": 300, "local": 0,
                "spill_loads": 0, "spill_stores": 0, "shared": 64, "loads": {"128": 1}}  # fmt: skip
        return {**made, **changed}

    rows = [row(1), row(2)]
    kept = summary.of([*rows, row(1, arch="sm_80")])
    archs = ["sm_90"]
    assert summary.differences(kept, rows, archs, []) == []
    for changed, words in (
        ([row(1), row(2, loads={"64": 2})], "BLOCK=2  *bf16: other counts, of as many registers"),
        ([row(1), row(2, registers=9)], "BLOCK=2  *bf16: registers 300 -> 9"),
        ([row(1)], "k  sm_90: 1 gone"),
        ([row(1), row(2), row(3)], "BLOCK=3  *bf16: new"),
        ([row(1), row(2, failure="no")], "BLOCK=2  *bf16: does not compile any more"),
    ):
        (line,) = summary.differences(kept, changed, archs, [])
        assert words in line
    assert summary.of([row(1, local=8)])["k", "sm_90"].spilled == 1
    with pytest.raises(ValueError, match="one digest"):
        summary.of([row(1), row(1)])
    # of one architecture, and of other code, nothing else is touched
    new = [row(3, source="t")]
    found = summary.renewed(kept, [], new, archs, [])
    assert found == {**summary.of(new), ("k", "sm_80"): kept["k", "sm_80"]}
    assert summary.renewed(kept, rows, [], archs, []) == kept
    assert summary.renewed(kept, rows[:1], [row(3)], archs, [])["k", "sm_90"].rows == (
        summary.of([row(1), row(3)])["k", "sm_90"].rows
    )


def test_a_changed_number_is_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _planted("copy")
    from tools.compiling import jobs

    monkeypatch.setattr(backend, "FLOORS", {"norm": ("rms_norm",)})
    monkeypatch.setattr(jobs, "CALLS", {"rms_norm": jobs.CALLS["rms_norm"][:1]})
    monkeypatch.setattr(jobs, "DTYPES", {"bf16": torch.bfloat16})
    kept = tmp_path / "kept.json"
    command = ["compile", "--arch", "sm_90"]
    assert main([*command, "--out", str(kept)]) == 0
    out = capsys.readouterr().out
    assert "1 compiled, 0 wrong" in out
    assert "rms_norm  sm_90  bf16" in out
    assert main([*command, "--check", str(kept)]) == 0

    # a summary of it: nothing is compiled again
    from tools.compiling import summary

    brief = tmp_path / "summary.json"
    summary.save(brief, *summary.load(kept))
    assert summary.load(brief) == summary.load(kept)
    renew = ["compile", "--arch", "sm_90", "--renew", str(brief)]
    before = brief.read_text().partition("kernels")[2]
    assert main(renew) == 0
    assert "0 compiled, 0 wrong" in capsys.readouterr().out
    assert brief.read_text().partition("kernels")[2] == before
    # one that comes out in another way, and one that nothing launches any more
    version, entries = summary.load(brief)
    (entry,) = entries.values()
    ((name, (digest, registers)),) = entry.rows.items()
    entry.rows[name] = digest, registers + 1
    entries["gone", "sm_90"] = dataclasses.replace(entry, kernel="gone")
    summary.save(brief, version, entries)
    assert main([*command, "--check", str(brief)]) == 1
    out = capsys.readouterr().out
    assert "2 changed" in out
    assert f"registers {registers + 1} -> {registers}" in out
    assert "gone  sm_90: 1 gone" in out

    found = json.loads(kept.read_text())
    renew = [*renew[:-1], str(kept)]
    kept.write_text(json.dumps({**found, "triton": "3.0.0"}))
    assert main([*command, "--check", str(kept)]) == 2
    assert "of triton 3.0.0" in capsys.readouterr().err
    assert main(renew) == 2
    assert "of triton 3.0.0" in capsys.readouterr().err
    assert main([*renew, "--out", str(kept)]) == 2
    assert main([*command, "--check", str(tmp_path / "none.json")]) == 2
