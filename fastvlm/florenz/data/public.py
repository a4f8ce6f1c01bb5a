"""Readers of four public sets, in the files in which they are published.

Each takes the folder (or file) of the texts and, where they lie elsewhere, the folder of the
pictures. Whatever is not as published is one DataError that names the file and the line.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastvlm.florenz.data.sets import EvaluationSet, Item
from fastvlm.florenz.data.shards import DataError

_DESCRIPTIONS = range(1, 6)  # of a picture of Multi30K's second task
# as the paper reports them; a figure is the mean of those of the splits
SPLITS = {
    "multi30k": "test_2016", "coco": "test",
    "multi30k-translation": "test_2016_flickr,test_2017_flickr,test_2017_mscoco",
}  # fmt: skip


def read_multi30k_translation(
    data: Path, images: Path | None, split: str, languages: Sequence[str] | None
) -> EvaluationSet:
    """Task 1: ``task1/raw/SPLIT.LANGUAGE[.gz]``, a sentence a line, and ``image_splits/SPLIT.txt``.

    languages: those to read; None: of German and French those that are there.
    """
    raw = _in_task(data, "task1", "raw")
    codes = list(languages or [c for c in ("de", "fr") if _path(raw, f"{split}.{c}")])
    if not codes:
        raise DataError(f"no {split}.de or {split}.fr (or .gz) in {raw}")
    columns = {code: _lines(raw, f"{split}.{code}") for code in ("en", *codes)}
    names = _names(_in_task(data, "task1", "image_splits"), f"{split}.txt")
    _same_length(raw, {**columns, "image_splits": names})
    paths = _pictures(images or data / "images", names)
    items = (
        Item(path, path.name, {code: (columns[code][i],) for code in codes}, columns["en"][i])
        for i, path in enumerate(paths)
    )
    return _made("multi30k-translation", items, raw)


def read_multi30k(
    data: Path, images: Path | None, split: str, languages: Sequence[str] | None
) -> EvaluationSet:
    """Task 2: ``task2/raw/SPLIT.N.LANGUAGE[.gz]``, N from 1 to 5, of English and German, and
    ``task2/image_splits/SPLIT_images.txt``."""
    raw = _in_task(data, "task2", "raw")
    codes = list(languages or [c for c in ("en", "de") if _path(raw, f"{split}.1.{c}")])
    if not codes:
        raise DataError(f"no {split}.1.en or {split}.1.de (or .gz) in {raw}")
    columns = {
        f"{n}.{code}": _lines(raw, f"{split}.{n}.{code}") for code in codes for n in _DESCRIPTIONS
    }
    names = _names(_in_task(data, "task2", "image_splits"), f"{split}_images.txt")
    _same_length(raw, {**columns, "image_splits": names})
    items = (
        Item(
            path, path.name,
            {code: tuple(columns[f"{n}.{code}"][i] for n in _DESCRIPTIONS) for code in codes},
        )
        for i, path in enumerate(_pictures(images or data / "images", names))
    )  # fmt: skip
    return _made("multi30k", items, raw)


def read_commute(
    data: Path, images: Path | None, split: str, languages: Sequence[str] | None
) -> EvaluationSet:
    """``en-LANGUAGE/`` with src.en, correct.LANGUAGE, incorrect.LANGUAGE and img.order."""
    root = next((f for f in (data, data / "CoMMuTE") if list(f.glob("en-??"))), None)
    if root is None:
        raise DataError(f"no folder en-de (or of another language) in {data}")
    codes = list(languages or [c for c in ("de", "fr", "ru", "zh") if (root / f"en-{c}").is_dir()])
    items: list[Item] = []
    for code in codes:
        folder = root / f"en-{code}"
        columns = {
            name: _lines(folder, name)
            for name in ("src.en", f"correct.{code}", f"incorrect.{code}")
        }
        names = _names(folder, "img.order")
        _same_length(folder, {**columns, "img.order": names})
        paths = _pictures(images or data / "images", names)
        items += (
            Item(path, path.name, {code: (right,)}, source, {code: wrong})
            for path, source, right, wrong in zip(paths, *columns.values())
        )
    return _made("commute", items, root)


def read_xm3600(
    data: Path, images: Path | None, split: str, languages: Sequence[str] | None
) -> EvaluationSet:
    """``captions.jsonl``: an object a line, with image/key and a language's ``{"caption": [...]}``;
    pictures KEY.jpg. languages: None: the six."""
    file = data if data.is_file() else data / "captions.jsonl"
    codes = list(languages or ("en", "de", "fr", "es", "ru", "zh"))
    keys, references = [], []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        record = _json(line, where)
        keys.append(f"{_field(record, 'image/key', str, where)}.jpg")
        found = {}
        for code in codes:
            captions = _field(
                _field(record, code, dict, where), "caption", list, f"{where}: {code}"
            )
            found[code] = _texts(captions, f"{where}: {code}: caption")
        references.append(found)
    folder = images or file.parent / "images"
    paths = _pictures(folder, keys) if keys else []
    items = (Item(path, path.name, found) for path, found in zip(paths, references))
    return _made("xm3600", items, file)


def read_coco(
    data: Path, images: Path | None, split: str, languages: Sequence[str] | None
) -> EvaluationSet:
    """``dataset_coco.json`` of Karpathy's split; pictures in train2014 and val2014, or beside.

    split: "test", "val", "train" or "restval". In English.
    """
    file = data if data.is_file() else data / "dataset_coco.json"
    if languages and list(languages) != ["en"]:
        raise DataError(f"coco is in en; not in {', '.join(languages)}")
    records = _field(_json(_text(file), str(file)), "images", list, str(file))
    names, references, splits = [], [], set()
    for number, record in enumerate(records):
        where = f"{file}: images[{number}]"
        splits.add(_field(record, "split", str, where))
        if record["split"] != split:
            continue
        folder = f"{record['filepath']}/" if record.get("filepath") else ""
        names.append(folder + _field(record, "filename", str, where))
        sentences = _field(record, "sentences", list, where)
        raw = [_field(one, "raw", str, f"{where}: sentences") for one in sentences]
        references.append(_texts(raw, f"{where}: sentences"))
    if records and not names:
        raise DataError(f"{file}: no picture of split {split!r}; there are {sorted(splits)}")
    paths = _pictures(images or file.parent, names) if names else []
    items = (Item(path, path.name, {"en": found}) for path, found in zip(paths, references))
    return _made("coco", items, file)


READERS = {
    "multi30k": read_multi30k, "multi30k-translation": read_multi30k_translation,
    "commute": read_commute, "xm3600": read_xm3600, "coco": read_coco,
}  # fmt: skip


def read_set(
    name: str, data: Path, images: Path | None, splits: str, languages: Sequence[str] | None
) -> EvaluationSet:
    """One of `READERS`. splits: with commas between them, or "" where a set has none."""
    items: list[Item] = []
    for split in splits.split(","):
        found = READERS[name](data, images, split.strip(), languages)
        items += (replace(item, split=split.strip()) for item in found.items)
    return EvaluationSet(name, tuple(items))


def _made(name: str, items: Iterable[Item], where: Path) -> EvaluationSet:
    found = EvaluationSet(name, tuple(items))
    if not found.items:
        raise DataError(f"{where}: nothing in it")
    return found


def _in_task(data: Path, task: str, name: str) -> Path:
    """A folder of a task, seen from the repository, from its data or from the task itself."""
    places = (data / "data" / task / name, data / task / name, data / name)
    return next((place for place in places if place.is_dir()), data)


def _path(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path} does not read: {why}") from None


def _lines(folder: Path, name: str) -> list[str]:
    """The lines of a file, none of them empty. A line ends at a line feed alone, as in the sets."""
    path = _path(folder, name)
    if path is None:
        raise DataError(f"no {name} (or {name}.gz) in {folder}")
    lines = [line.strip() for line in _text(path).removesuffix("\n").split("\n")]
    if lines == [""]:
        raise DataError(f"{path}: nothing in it")
    if "" in lines:
        raise DataError(f"{path}:{lines.index('') + 1}: an empty line")
    return lines


def _names(folder: Path, name: str) -> list[str]:
    # of COCO's pictures Multi30K writes NAME#NUMBER
    return [line.partition("#")[0] for line in _lines(folder, name)]


def _same_length(folder: Path, columns: dict[str, list[str]]) -> None:
    counts = {name: len(lines) for name, lines in columns.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{folder}: files of unequally many lines: {told}")


def _pictures(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of these names, also within COCO's two folders. DataError: some are not there."""
    found, lost = [], []
    for name in names:
        inner = next((part for part in ("train2014", "val2014") if part in name), "")
        places = (folder / name, folder / inner / name, folder / Path(name).name)
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            lost.append(name)
        else:
            found.append(path)
    if lost:
        raise DataError(f"{len(lost)} of {len(names)} pictures are not in {folder}: {lost[0]}, ...")
    return found


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: no JSON: {error}") from None


def _field(record: Any, name: str, kind: type, where: str) -> Any:
    found = record.get(name) if isinstance(record, dict) else None
    if not isinstance(found, kind):
        there = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: {name!r} must be a {kind.__name__}; there is {there}")
    return found


def _texts(found: Sequence[Any], where: str) -> tuple[str, ...]:
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise DataError(f"{where}: must be texts, one or more, none empty; got {list(found)!r}")
    return tuple(text.strip() for text in found)
