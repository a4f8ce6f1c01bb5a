"""What is made beside the lines: texts, drawings, shards, and a page to look at."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from folders import encoded, fill, lines, noise, run, shard
from PIL import Image

from fastvlm.captioning import models
from fastvlm.captioning.answers import Answer
from fastvlm.captioning.draw import Drawings, draw
from fastvlm.captioning.report_page import write_page
from fastvlm.captioning.shards import write_shards
from fastvlm.captioning.sources import Item, Source

BOXES = "<s>cat<loc_100><loc_200><loc_499><loc_799></s>"


@pytest.fixture
def sees_cats(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that finds a cat in each picture, always in the same part of it."""
    made = models.random(True, "cpu")
    words = made.processor.tokenizer
    real = words.decode
    words.decode = lambda ids, skip_special_tokens=True: (
        real(ids, skip_special_tokens=True) if skip_special_tokens else BOXES
    )
    monkeypatch.setattr(models, "random", lambda *_: made)


def test_texts_stand_beside_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill(tmp_path / "p", 3)
    (folder / "bad.png").write_bytes(b"x")
    (folder / "b" / "p001.txt").write_text("written by hand")
    out = tmp_path / "o.jsonl"
    assert run(folder, out, "--txt") == 0
    said = {line["path"]: line["text"] for line in lines(out) if "text" in line}
    assert (folder / "p000.txt").read_text() == said["p000.png"] + "\n"
    assert (folder / "b" / "c" / "p002.txt").read_text() == said["b/c/p002.png"] + "\n"
    assert (folder / "b" / "p001.txt").read_text() == "written by hand"
    assert "p001.txt: there already" in capsys.readouterr().err
    assert not list(folder.rglob("*.new"))
    assert not (folder / "bad.txt").exists()
    options = ("--txt", "--lang", "en,de", "--task", "<CAPTION>", "--task", "What colour?")
    assert run(folder, tmp_path / "o2.jsonl", *options) == 0
    assert {path.name for path in folder.glob("p000*.txt")} == {
        "p000.txt", "p000.caption.en.txt", "p000.caption.de.txt", "p000.what_colour.en.txt",
        "p000.what_colour.de.txt",
    }  # fmt: skip


def test_what_was_found_is_drawn(tmp_path: Path, sees_cats: None) -> None:
    folder = fill(tmp_path / "p", 2)
    assert run(folder, tmp_path / "o.jsonl", "--task", "<OD>", "--draw", str(tmp_path / "d")) == 0
    first = lines(tmp_path / "o.jsonl")[-1]
    width, height = Image.open(folder / "p000.png").size
    x1, y1, x2, y2 = first["boxes"][0]
    assert (x1, x2) == (int(0.1005 * width), int(0.4995 * width))
    assert (y1, y2) == (int(0.2005 * height), int(0.7995 * height))
    drawn = tmp_path / "d"
    names = sorted(path.relative_to(drawn).as_posix() for path in drawn.rglob("*.*"))
    assert names == ["b/p001.jpg.jpg", "p000.png.jpg"]
    assert Image.open(tmp_path / "d" / "p000.png.jpg").size == (width, height)


def test_all_shapes_are_drawn_where_they_are() -> None:
    blank = Image.new("RGB", (200, 100), "white")
    answer = Answer(
        "t", None, "", 0.0, (), boxes=[[10, 20, 60, 80]],
        quads=[[100, 10, 190, 10, 190, 40, 100, 40]],
        polygons=[[[100, 60, 190, 60, 150, 90]], [[5, 5]], []], labels=["a", "图", ""],
    )  # fmt: skip
    seen = np.asarray(draw(blank, [answer]))
    inked = (seen != 255).any(2)
    for x, y in ((10, 50), (60, 50), (35, 80), (145, 40), (190, 25), (145, 60)):
        assert inked[y, x], (x, y)
    for x, y in ((35, 50), (145, 75), (80, 50), (150, 50), (198, 98)):
        assert not inked[y, x], (x, y)
    assert np.asarray(blank).min() == 255
    # as large as the picture, outside of it, of no size
    odd = Answer(
        "t", None, "", 0.0, (), boxes=[[0, 0, 199, 99], [-5, 0, 900, 0]], labels=["b" * 99]
    )
    assert draw(blank, [odd]).size == (200, 100)


def test_drawings_stay_in_their_folder(tmp_path: Path) -> None:
    for path in ("../../x.png", "/etc/x.png", "a/../../x.png"):
        target = Drawings(tmp_path).path_of(Item(path, "", ".png"))
        assert target.resolve().is_relative_to(tmp_path)


def read(path: Path) -> list[dict[str, Any]]:
    return list(webdataset.WebDataset(str(path), shardshuffle=False))


def test_shards_are_read_by_webdataset(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", 5)
    (folder / "a.b.png").write_bytes(encoded(noise(7)))
    (folder / "bad.png").write_bytes(b"x")
    out = tmp_path / "o.jsonl"
    assert run(folder, out, "--webdataset", str(tmp_path / "w")) == 0
    said = {line["path"]: line for line in lines(out)}
    samples = read(tmp_path / "w" / "000000.tar")
    assert [sample["__key__"] for sample in samples] == [
        "a_b_png", "b/c/p002_png", "b/p001_jpg", "b/p004_png", "p000_png", "p003_jpg",
    ]  # fmt: skip
    for sample in samples:
        (line,) = json.loads(sample["json"])
        assert line == said[line["path"]]
        assert sample["txt"].decode() == line["text"]
        suffix = Path(line["path"]).suffix[1:]
        assert sample[suffix] == (folder / line["path"]).read_bytes()
    # in shards of two, and shards again to shards of the same names
    assert write_shards(Source([str(folder)]), out, tmp_path / "two", samples=3) == 6
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "000000.tar", "000001.tar", "000002.tar",
    ]  # fmt: skip
    again = tmp_path / "again.jsonl"
    options = ("--webdataset", str(tmp_path / "w2"), "--lang", "en,de")
    assert run(tmp_path / "two" / "*.tar", again, *options) == 0
    first = read(tmp_path / "w2" / "000000.tar")
    assert [sample["__key__"] for sample in first] == ["a_b_png", "b/c/p002_png", "b/p001_jpg"]
    assert [line["language"] for line in json.loads(first[0]["json"])] == ["en", "de"]
    assert "txt" not in first[0]


def test_a_page_shows_it_all_and_needs_nothing_else(tmp_path: Path, sees_cats: None) -> None:
    folder = fill(tmp_path / "p", 3)
    (folder / "<b>&'.png").write_bytes(b"x")
    page = tmp_path / "page.html"
    options = ("--report", str(page), "--task", "<OD>", "--task", "<CAPTION>", "--lang", "en,zh")
    assert run(folder, tmp_path / "o.jsonl", *options) == 0
    text = page.read_text()
    assert text.count("<figure>") == 3
    assert text.count("data:image/jpeg;base64,") == 3
    assert text.count("<polygon") == text.count(">cat</text>") == 3
    assert "lang='zh'" in text
    assert "&lt;b&gt;&amp;&#x27;.png" in text
    assert "<b>&'" not in text
    assert "no image format that Pillow knows" in text
    assert "random: the text means nothing" in text
    assert not re.findall(r"""(?:src|href)=['"](?!data:)""", text)
    assert "<script" not in text


def test_a_page_of_many_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvlm.captioning import report_page

    monkeypatch.setattr(report_page, "MOST_PICTURES", 2)
    folder = fill(tmp_path / "p", 4)
    out, page = tmp_path / "o.jsonl", tmp_path / "page.html"
    assert run(folder, out) == 0
    points = [(0.0, 0), (1.0, 3), (2.0, 4), (400.0, 900)]
    write_page(page, Source([str(folder)]), out, {"model": "m"}, points)
    text = page.read_text()
    assert text.count("<figure>") == 2
    assert "The first 2 of 4." in text
    assert "<polyline" in text
    assert "6.67 min" in text


def test_shards_have_no_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shard(tmp_path / "a.tar", {"a": {"png": encoded(noise(1))}})
    assert run(path, tmp_path / "o.jsonl", "--txt") == 2
    assert "--txt wants a folder or pictures (of shards: --webdataset)" in capsys.readouterr().err
