"""Public sets read as they are published; what is not so is one error that names file and line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import public_sets
import pytest

from fastvlm.__main__ import main
from fastvlm.florenz.data import DataError
from fastvlm.florenz.data.public import READERS, SPLITS, read_set
from fastvlm.florenz.data.sets import EvaluationSet, chosen
from fastvlm.florenz.evaluation.paper import MEANS, paper_rows

MAKE: dict[str, Callable[[Path], Path]] = {
    "multi30k": public_sets.multi30k, "multi30k-translation": public_sets.multi30k,
    "commute": public_sets.commute, "xm3600": public_sets.xm3600, "coco": public_sets.coco,
}  # fmt: skip


def read(
    name: str, root: Path, languages: list[str] | None = None, split: str = ""
) -> EvaluationSet:
    one = SPLITS.get(name, "").partition(",")[0]
    return READERS[name](root, None, split or one, languages)


def test_multi30k(tmp_path: Path) -> None:
    root = public_sets.multi30k(tmp_path)
    found = read("multi30k-translation", root)
    assert found.task == "translation"
    assert [item.source for item in found.items] == ["There is a red ball.", "There are two cups."]
    assert found.items[1].references == {
        "de": ("Da sind zwei Tassen.",), "fr": ("Il y a deux tasses.",)
    }  # fmt: skip
    assert [item.name for item in found.items] == ["1.jpg", "2.jpg"]
    described = read("multi30k", root)
    assert described.task == "caption"
    assert described.items[0].name == "2.jpg"
    assert described.items[0].references["de"] == tuple(f"Zwei Tassen, {n}." for n in range(1, 6))
    # the folder of a task does as well
    inner = READERS["multi30k"](root / "data" / "task2", root / "images", "test_2016", ["en"])
    assert [list(item.references) for item in inner.items] == [["en"]] * 2


def test_splits_are_read_one_after_the_other(tmp_path: Path) -> None:
    root = public_sets.multi30k(tmp_path)
    name = "COCO_val2014_000000000001.jpg"
    public_sets.picture(root / "images" / "val2014" / name)
    raw = root / "data" / "task1" / "raw"
    public_sets.lines(raw.parent / "image_splits" / "test_2017_mscoco.txt", f"{name}#5")
    for code, text in (("en", "A cup."), ("de", "Eine Tasse."), ("fr", "Une tasse.")):
        public_sets.lines(raw / f"test_2017_mscoco.{code}", text)  # not compressed does as well
    splits = "test_2016_flickr, test_2017_mscoco"
    found = read_set("multi30k-translation", root, None, splits, None)
    assert [item.split for item in found.items] == ["test_2016_flickr"] * 2 + ["test_2017_mscoco"]
    assert (found.items[2].name, found.items[2].source) == (name, "A cup.")
    assert SPLITS["multi30k-translation"].count(",") == 2


def test_commute(tmp_path: Path) -> None:
    found = read("commute", public_sets.commute(tmp_path))
    assert found.task == "translation"
    assert found.languages == ["de", "zh"]
    assert [item.name for item in found.items] == ["a.jpeg", "b.png"] * 2
    assert found.items[1].references == {"de": ("Das Ufer.",)}
    assert found.items[1].wrong == {"de": "Die Bank."}


def test_xm3600(tmp_path: Path) -> None:
    found = read("xm3600", public_sets.xm3600(tmp_path))
    assert found.languages == ["en", "de", "fr", "es", "ru", "zh"]
    assert found.items[1].references["ru"] == ("ru 00b one", "ru 00b two")
    assert found.items[1].name == "00b.jpg"


def test_coco(tmp_path: Path) -> None:
    root = public_sets.coco(tmp_path)
    (item,) = read("coco", root).items
    assert item.references == {"en": tuple(f"A picture {i} of test." for i in range(3))}
    assert item.image.parent.name == "val2014"
    assert len(read("coco", root, split="train").items[0].references["en"]) == 2
    assert READERS["coco"](root / "dataset_coco.json", root, "test", ["en"]).items == (item,)


def test_languages_and_items_are_chosen(tmp_path: Path) -> None:
    found = read("multi30k", public_sets.multi30k(tmp_path))
    some = chosen(found, ["de"], 1)
    assert [list(item.references) for item in some.items] == [["de"]]
    with pytest.raises(DataError, match="multi30k is in en, de; not in ru"):
        chosen(found, ["ru"], None)


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    public_sets.lines(path, *change(path.read_text().rstrip("\n").split("\n")))


FAULTS = [
    ("multi30k-translation", "data/task1/raw/test_2016_flickr.en.gz", None,
     "no test_2016_flickr.en"),
    ("multi30k", "data/task2/raw/test_2016.4.de.gz", None, "no test_2016.4.de"),
    ("multi30k", "images/1.jpg", None, "1 of 2 pictures are not in .*1.jpg"),
    ("commute", "en-de/correct.de", lambda lines: lines[:1],
     "unequally many lines: .*correct.de 1"),
    ("commute", "en-de/src.en", lambda lines: ["", *lines[1:]], "src.en:1: an empty line"),
    ("commute", "en-zh/img.order", None, "no img.order"),
    ("xm3600", "captions.jsonl", None, "captions.jsonl does not read"),
    ("xm3600", "captions.jsonl", lambda lines: [""], "captions.jsonl: nothing in it"),
    ("xm3600", "captions.jsonl", lambda lines: [lines[0], "{"], "captions.jsonl:2: no JSON"),
    ("xm3600", "captions.jsonl", lambda lines: [lines[0].replace('"ru"', '"xx"')],
     "captions.jsonl:1: 'ru' must be a dict"),
    ("xm3600", "captions.jsonl", lambda lines: [lines[0].replace("es 00a one", " ")],
     "captions.jsonl:1: es: caption: must be texts"),
    ("coco", "dataset_coco.json", lambda lines: [lines[0].replace('"raw"', '"text"')],
     r"images\[1\]: sentences: 'raw' must be a str"),
    ("coco", "dataset_coco.json", lambda lines: [lines[0].replace('"test"', '"tset"')],
     "no picture of split 'test'; there are"),
    ("coco", "dataset_coco.json", lambda lines: ['{"images": []}'], "nothing in it"),
    ("coco", "dataset_coco.json", lambda lines: ["[]"], "'images' must be a list; there is list"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "change", "words"), FAULTS)
def test_what_is_not_as_published_is_named(
    name: str, file: str, change: Callable[[list[str]], list[str]] | None, words: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    root = MAKE[name](tmp_path)
    if change is None:
        (root / file).unlink()
    else:
        edit(root / file, change)
    with pytest.raises(DataError, match=words):
        read(name, root, ["de", "zh"] if name == "commute" else None)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    root = public_sets.multi30k(tmp_path)
    file = root / "data" / "task1" / "raw" / "test_2016_flickr.fr.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"flickr.fr.gz does not read"):
        read("multi30k-translation", root)


def test_arguments_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(public_sets.coco(tmp_path))
    for more, words in [
        ([], "MODEL wants a checkpoint, or --answers; got neither"),
        (["m", "--answers", "x"], "got both"),
        (["m"], "--set wants one of"),
        (["m", "--set", "coco"], "--data wants the files of coco"),
        (["m", "--set", "world", "--data", root], "--data wants no --set world"),
        (["m", "--set", "coco", "--data", root, "--languages", "de"], "coco is in en; not in de"),
        (["m", "--set", "coco", "--data", root, "--languages", "xx"], "--languages wants some of"),
        (["m", "--set", "coco", "--data", root, "--metrics", "comet"], "--metrics wants some of"),
        (["m", "--set", "coco", "--data", root], "--model"),
        (["--answers", root, "--set", "coco"], "--set wants no --answers beside it"),
        (["--answers", str(tmp_path)], "--answers wants a folder of an earlier --out"),
    ]:  # fmt: skip
        assert main(["florenz", "evaluate", *more]) == 2
        told = capsys.readouterr().err
        assert words in told
        assert told.count("\n") == 1


def test_the_papers_figures_agree_with_each_other() -> None:
    assert paper_rows("world") == {}
    assert paper_rows("commute")["paper, 3.5B, fine-tuned"][("BLEU", "X")] == 26.0
    rows = paper_rows("xm3600")
    assert rows["paper, 11.2B, before fine-tuning"][("CIDEr", "unseen")] == 26.6
    complete = [row for row in rows.values() if ("CIDEr", "zh") in row]
    assert len(complete) == 4
    for row in complete:  # two tables of the paper
        mean = sum(row["CIDEr", code] for code in MEANS["xm3600"]["unseen"]) / 4
        assert mean == pytest.approx(row["CIDEr", "unseen"], abs=0.06)
    told = [row for row in paper_rows("commute").values() if ("BLEU", "zh") in row]
    assert len(told) == 3
    for row in told:
        for metric in ("BLEU", "accuracy"):
            mean = sum(row[metric, code] for code in MEANS["commute"]["X"]) / 4
            assert mean == pytest.approx(row[metric, "X"], abs=0.06)
