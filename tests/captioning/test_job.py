"""``python -m fastvlm caption FOLDER --out FILE``: every picture once, whatever it is."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import QUICK, encoded, fill, keys, lines, noise, run, shard, texts
from test_pictures import broken

import fastvlm
from fastvlm.__main__ import main
from fastvlm.captioning import models
from fastvlm.nn.compute import unavailable


def test_a_folder_is_captioned_as_caption_does(tmp_path: Path) -> None:
    fill(tmp_path / "p", 5)
    out = tmp_path / "o.jsonl"
    assert run(tmp_path / "p", out, "--lang", "en,de", "--task", "caption", "--task", "<OD>") == 0
    made = models.random(True, "cpu")
    names = ["b/c/p002.png", "b/p001.jpg", "b/p004.png", "p000.png", "p003.jpg"]
    want = fastvlm.caption(
        made.model, made.processor, [str(tmp_path / "p" / name) for name in names], ["en", "de"],
        num_beams=2, max_new_tokens=4,
    )  # fmt: skip
    captions = [line for line in lines(out) if line["task"] == "<CAPTION>"]
    assert [(line["path"], line["language"], line["text"]) for line in captions] == [
        (names[c.image], c.language, c.text) for c in want
    ]
    scores = [line["score"] for line in captions]
    assert scores == pytest.approx([c.score for c in want], abs=1e-3)
    found = [line for line in lines(out) if line["task"] == "<OD>"]
    assert len(found) == 5
    assert list(found[0]) == [
        "path", "task", "language", "text", "score", "boxes", "labels", "model", "revision",
    ]  # fmt: skip
    assert (found[0]["model"], found[0]["revision"]) == ("a tiny Florence-2, random", "seed 0")


def test_broken_pictures_are_lines_that_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path / "p", 3)
    reasons = broken(folder)
    out = tmp_path / "o.jsonl"
    assert run(folder, out, "--lang", "en,de") == 0
    assert f"{len(reasons)} could not be read" in capsys.readouterr().err
    wrong = [line for line in lines(out) if "error" in line]
    assert sorted(line["path"] for line in wrong) == sorted([*reasons] * 2)
    for line in wrong:
        assert re.search(reasons[line["path"]], line["error"])
        assert list(line) == ["path", "task", "language", "error", "model", "revision"]
    assert len([line for line in lines(out) if "text" in line]) == 6
    # done is done, failed too, unless asked
    before = out.read_bytes()
    assert run(folder, out, "--lang", "en,de", "--resume") == 0
    assert out.read_bytes() == before
    noise(8).save(folder / "empty.jpg")
    assert run(folder, out, "--lang", "en,de", "--retry") == 0
    assert len(keys(out)) == len(set(keys(out))) == 2 * (3 + len(reasons))
    mended = [line for line in lines(out) if line["path"] == "empty.jpg"]
    assert all("text" in line for line in mended)
    assert len([line for line in lines(out) if "error" in line]) == 2 * (len(reasons) - 1)


def test_a_resume_asks_only_what_is_missing(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", 4)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "o.jsonl"
    options = ("--lang", "en,de", "--task", "<CAPTION>", "--task", "<OCR>")
    assert run(folder, whole, *options) == 0
    raw = whole.read_bytes().splitlines(keepends=True)
    # some languages of a picture are there, one line is torn
    out.write_bytes(b"".join(raw[i] for i in (0, 4, 5, 9)) + raw[1][:20])
    assert run(folder, out, *options, "--resume") == 0
    assert len(keys(out)) == len(raw)
    assert texts(out) == texts(whole)
    assert run(folder, tmp_path / "new.jsonl", *options, "--resume") == 0
    assert texts(tmp_path / "new.jsonl") == texts(whole)


@pytest.mark.parametrize("bits", ["int8", "bf16"])
def test_lines_in_fewer_bits_say_so_and_mix_with_no_others(
    bits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if (why := unavailable(bits)) is not None:
        pytest.skip(why)
    fill(tmp_path / "p", 2)
    out = tmp_path / "o.jsonl"
    assert run(tmp_path / "p", out, f"--{bits}") == 0
    assert {line["model"] for line in lines(out)} == {f"a tiny Florence-2, random, {bits}"}
    assert all("text" in line for line in lines(out))
    assert run(tmp_path / "p", out, "--resume") == 2
    assert f"by a tiny Florence-2, random, {bits}" in capsys.readouterr().err
    assert run(tmp_path / "p", tmp_path / "other.jsonl", f"--{bits}", "--device", "cuda") == 2
    assert run(tmp_path / "p", tmp_path / "other.jsonl", "--int8", "--bf16") == 2


@pytest.mark.parametrize("bits", ["int8", "bf16"])
def test_fewer_bits_are_refused_where_nothing_multiplies_them(
    bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "p", 1)
    monkeypatch.setattr(f"fastvlm.cpu.{bits}.unavailable", lambda: "this CPU does not")
    assert run(tmp_path / "p", tmp_path / "o.jsonl", f"--{bits}") == 2
    wanted = f"--{bits} wants left out here; got set, and this CPU does not"
    assert wanted in capsys.readouterr().err


def test_shards_give_what_their_pictures_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path / "p", 4)
    assert run(folder, tmp_path / "folder.jsonl") == 0
    paths = [line["path"] for line in lines(tmp_path / "folder.jsonl")]
    for number in (0, 1):
        shard(
            tmp_path / f"s-{number}.tar",
            {
                path.split(".")[0]: {path.split(".")[1]: (folder / path).read_bytes(), "txt": b"x"}
                for path in paths[2 * number : 2 * number + 2]
            },
        )
    shard(tmp_path / "s-2.tar", {paths[0].split(".")[0]: {"png": encoded(noise(9))}})
    out = tmp_path / "o.jsonl"
    assert run(tmp_path / "s-{0..2}.tar", out) == 0
    assert "another sample is called b/c/p002" in capsys.readouterr().err
    assert [line["text"] for line in lines(out)] == [
        line["text"] for line in lines(tmp_path / "folder.jsonl")
    ]
    assert [line["path"] for line in lines(out)] == [path.split(".")[0] for path in paths]


def test_it_stops_politely(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM, as clusters send it: what is done is kept, and the rest is a resume."""
    folder, out = fill(tmp_path / "p", 12), tmp_path / "o.jsonl"
    before = signal.getsignal(signal.SIGTERM)

    def stop() -> None:
        while not (out.exists() and out.stat().st_size):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    code = run(folder, out, "--batch-size", "1", "--new-tokens", "20")
    assert code == 130
    assert "--resume goes on with it" in capsys.readouterr().err
    assert 0 < len(lines(out)) < 12
    assert signal.getsignal(signal.SIGTERM) is before
    assert run(folder, out, "--resume", "--new-tokens", "20") == 0
    assert len(keys(out)) == len(set(keys(out))) == 12


def test_a_model_that_always_fails_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = models.random(True, "cpu")

    def fails(pixels: torch.Tensor) -> Any:
        raise RuntimeError("no kernel image is available")

    made.model.get_image_features = fails
    monkeypatch.setattr(models, "random", lambda *_: made)
    assert run(fill(tmp_path / "p", 9), tmp_path / "o.jsonl") == 1
    err = capsys.readouterr().err
    assert "the model failed on each of the first pictures" in err
    assert "no kernel image is available" in err
    assert len(lines(tmp_path / "o.jsonl")) < 9


REFUSED: dict[str, tuple[list[str], str]] = {
    "missing": (["nowhere", "--out", "o.jsonl"], "SOURCE wants a folder, a picture or a .tar"),
    "empty": (["empty", "--out", "o.jsonl"], "SOURCE wants something with a picture in it"),
    "none": (["--out", "o.jsonl"], "SOURCE wants a folder, pictures or shards"),
    "no-out": (["p"], "SOURCE wants --out beside it"),
    "resume": (["--resume"], "--resume wants --out beside it"),
    "batch": (["--batch-size", "4"], "--batch-size wants --out beside it"),
    "exists": (["p", "--out", "there.jsonl"], "--out wants a file that is not there yet, or --re"),
    "not-ours": (["p", "--out", "x.txt", "--resume"], "--out wants a file that this command wrote"),
    "other-model": (["p", "--out", "other.jsonl", "--resume"], "--out wants a file by this model"),
    "is-folder": (["p", "--out", "empty", "--resume"], "--out wants a file; got"),
    "no-folder": (["p", "--out", "no/o.jsonl"], "--out wants a file in a folder that is there"),
    "task": (["p", "--out", "o.jsonl", "--task", "<X>"], "--task wants a task of <CAPTION>"),
    "json": (["p", "--out", "o.jsonl", "--json"], "--json wants no --out beside it"),
    "image": (["p", "--out", "o.jsonl", "--image", "a"], "--image wants no --out beside it"),
    "boxes": (["--task", "<OD>"], "--task wants --out beside <OD>"),
    "two-tasks": (["--task", "a", "--task", "b"], "--task wants one, or --out beside several"),
    "language": (["p", "--out", "o.jsonl", "--lang", "xx"], "--lang wants some of en,de"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "p", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.jsonl").write_text("")
    (tmp_path / "x.txt").write_text("letters\nthat somebody wrote\n")
    other = {"path": "a", "task": "b", "language": None, "model": "another", "revision": None}
    (tmp_path / "other.jsonl").write_text(json.dumps(other) + "\n")
    arguments, wanted = REFUSED[case]
    quick = [option for option in QUICK if option != "--quiet" or "--out" in arguments]
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert main(["caption", *arguments, *quick]) == 2
    err = capsys.readouterr().err.splitlines()
    assert [line for line in err if wanted in line] == [err[-1]]
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before
