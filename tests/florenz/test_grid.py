"""A grid trains each of its runs once, shares what they have in common, and is taken up again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvlm.__main__ import main
from fastvlm.florenz.scaling import read_runs
from fastvlm.florenz.scaling.grid import Cell, Grid, cells_of

FAST = ["florenz", "grid", "--sizes", "mini", "--scenes", "1", "--steps", "2,3"]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What each run was told, all of them in this process, which has its imports done."""
    told: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> Any:
        assert command[:3] == [sys.executable, "-m", "fastvlm"]
        told.append(command[3:])
        threads = torch.get_num_threads()
        code = main(command[3:])
        torch.set_num_threads(threads)
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    return told


def test_each_run_begins_with_what_another_trained() -> None:
    cells = [*cells_of(["tiny"], [6, 2], [50, 20]), *cells_of(["tiny"], [4], [20])]
    grid = Grid(tuple(cells), "bare", 0, 1)
    starts = {cell.name: (found := grid.start_of(cell)) and found.name for cell in cells}
    assert starts == {
        "tiny-6-20": None,
        "tiny-6-50": "tiny-6-20",
        "tiny-2-20": "tiny-6-20",
        "tiny-2-50": "tiny-2-20",
        "tiny-4-20": "tiny-6-20",
    }
    scratch = cells_of(["nano"], [None], [20])
    assert scratch == [Cell("nano", None, 20)]
    assert scratch[0].name == "nano-scratch-20"


@pytest.mark.turns(2)
def test_a_grid_is_trained_and_taken_up_again(
    runs: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid"
    assert main([*FAST, "--languages", "6", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 runs, 0 of them done" in said
    # the second takes both stages of the first
    first, second = ((out / f"mini-6-{n}.log").is_file() and out / f"mini-6-{n}" for n in (2, 3))
    assert (first / "language_model").is_dir()
    assert not (second / "language_model").exists()
    assert not (second / "vision_tower").exists()
    found = read_runs(out / "runs.jsonl")
    assert [(run.size, run.languages, run.samples) for run in found] == [
        ("mini", 6, 12),
        ("mini", 6, 18),
    ]
    kept = json.loads((out / "grid.json").read_text())["runs"]
    for run, more in zip(found, kept):
        results = json.loads((out / f"mini-6-{more['steps']}" / "results.json").read_text())
        assert run.losses == results["emergence"]["losses"]
        assert run.parameters == results["parameters"]["total"]
        assert 0 <= more["with the prefix"]["exact"] <= more["with the prefix"]["language"] <= 1
    # another number of languages: only that is trained, with a language model and the old tower
    runs.clear()
    assert main([*FAST, "--languages", "6,2", "--steps", "2", "--out", str(out), "--resume"]) == 0
    (told,) = runs
    assert told[told.index("--languages") + 1] == "2"
    assert (out / "mini-2-2" / "language_model").is_dir()
    assert not (out / "mini-2-2" / "vision_tower").exists()


def test_a_run_that_fails_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def run(command: list[str], **kwargs: Any) -> Any:
        told.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    assert main([*FAST, "--out", str(tmp_path)]) == 2
    assert len(told) == 1  # the others would begin with it
    assert f"one that failed: {tmp_path / 'mini-6-2.log'}" in capsys.readouterr().err
    assert (tmp_path / "runs.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--sizes", "huge"], "--sizes wants names of"),
        (["--steps", "10,x"], "--steps wants a whole number"),
        (["--languages", "3"], "--languages wants numbers of 2, 4, 6; got 3"),
        (["--more", "tiny"], "--more wants a whole number"),
        (["--more", "big:4"], "--sizes wants names of"),
        (["--resume"], "--resume wants a folder with a grid"),
        (["--processes", "0"], "--processes wants"),
    ],
)
def test_arguments_that_cannot_be_used(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FAST, "--out", str(tmp_path / "grid"), *more]) == 2
    assert words in capsys.readouterr().err


def test_another_grid_is_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid.json").write_text(
        json.dumps({"settings": {"prompts": "bare", "seed": 1, "scenes": 1, "cells": []}})
    )
    assert main([*FAST, "--out", str(tmp_path)]) == 2
    assert "new or empty" in capsys.readouterr().err
    assert main([*FAST, "--out", str(tmp_path), "--resume"]) == 2
    assert "seed" in capsys.readouterr().err
