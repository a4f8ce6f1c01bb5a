"""The benchmark of the whole job runs, on a tiny model, and says what it is about."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("skimage")

from benchmarks.job.__main__ import case_of, main
from benchmarks.job.sides import openvino_tower
from benchmarks.job.workload import TINY, build, captioning, training


@pytest.mark.slow
def test_the_small_job(tmp_path: Path) -> None:
    assert main(["--small", "--seconds", "5", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "job-cpu-small.json").read_text())
    cases = {case["case"]: case for case in found["cases"]}
    assert list(cases) == ["tower", "one photo", "photos", "step, small images", "step"]
    for case in cases.values():
        assert {"sdpa", "fastvlm"} <= set(case["median"])
        assert all(seconds > 0 for side in case["seconds"].values() for seconds in side)
    off_by = cases["tower"]["off_by"]
    narrow = [off_by.pop(side) for side in list(off_by) if "int8" in side or "bf16" in side]
    assert all(0 < off < 0.1 for off in narrow)
    assert max(off_by.values()) < 1e-4
    assert "fastvlm, features kept" in cases["step"]["median"]
    losses = cases["step, small images"]["eval_loss"]
    assert abs(losses["fastvlm"] - losses["sdpa"]) < 1e-4 * abs(losses["sdpa"])


class Stack(ctypes.Structure):
    """stack_t of signal.h."""

    _fields_ = (("begin", ctypes.c_void_p), ("flags", ctypes.c_int), ("bytes", ctypes.c_size_t))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_signals_have_a_stack_when_openvino_is_gone() -> None:
    """Where they have none, the next child that ends, ends this process too."""
    pytest.importorskip("openvino")
    model = build(tiny=True)
    pixels = captioning(model, TINY, 1)["pixel_values"]
    first, second = (openvino_tower(model, pixels) for _ in range(2))
    del first
    del second
    stack = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    if stack.begin is not None:
        maps = Path("/proc/self/maps").read_text().splitlines()
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
        assert any(begin <= stack.begin < end for begin, end in spans)


def test_ratios_are_to_sdpa() -> None:
    case = case_of("x", {"sdpa": [4.0, 2.0, 3.0], "fastvlm": [1.0, 1.5, 2.0]}, pixels=1)
    assert case["median"] == {"sdpa": 3.0, "fastvlm": 1.5}
    assert case["ratio"] == {"sdpa": 1.0, "fastvlm": 2.0}


def test_a_batch_is_padded_as_said() -> None:
    model = build(tiny=True)
    batch = training(model, TINY.short, 3, TINY)
    labels, mask = batch["labels"], batch["attention_mask"]
    lengths = (labels != -100).sum(1)
    assert lengths.max() == labels.shape[1] == TINY.labels[1]
    assert lengths.min() >= TINY.labels[0]
    prompts = mask.sum(1) - (1 + (TINY.short // 32) ** 2)
    assert prompts.max() == TINY.prompts[1]
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 3 * 5
