"""python -m fastvlm check: exit codes, JSON, checkpoints with and without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import FAMILIES

from fastvlm import ops
from fastvlm.__main__ import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FAMILIES["gemma2"].build().save_pretrained(tmp_path)
    return tmp_path


QUICK = ["--new-tokens", "3", "--beams", "2"]


def test_a_small_model_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--small", *QUICK]) == 0
    out, _ = capsys.readouterr()
    assert "fastvlm.check(Florence2ForConditionalGeneration): same" in out
    assert "tokens of 2 beams" in out


def test_a_folder_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", str(folder), "--dtype", "bfloat16", "--no-train", "--json"]
    assert main(["check", *given, *QUICK]) == 0
    figures = json.loads(capsys.readouterr()[0])
    assert figures["ok"] is True
    assert figures["model"] == "Gemma2ForCausalLM"
    assert "input_ids [2, 12]" in figures["batch"]


def test_a_difference_is_exit_code_1(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", lambda *a, **k: 1.01 * real(*a, **k))
    assert main(["check", "--model", str(folder), "--no-train", *QUICK]) == 1
    assert "DIFFERENT" in capsys.readouterr()[0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "no-such-folder-here"], ["--model", "no-such-folder-here"]),
        (["--small", "--model", "x"], ["--small", "no --model"]),
        (["--small", "--text", "a"], ["--text", "--model beside it"]),
        (["--small", "--image", "missing.png"], ["--image", "missing.png"]),
        (["--beams", "0"], ["--beams", "at least 1"]),
    ],
)
def test_bad_usage_is_exit_code_2(
    arguments: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["check", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    for part in parts:
        assert part in err


def test_what_a_folder_does_not_have(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--model", str(folder), "--text", "a"]) == 2
    assert "--text" in capsys.readouterr()[1]
    assert main(["check", "--model", str(folder), "--image", "a.png"]) == 2
    assert "--image" in capsys.readouterr()[1]
