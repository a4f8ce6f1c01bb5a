"""Pictures with what was said of them as WebDataset shards, made of a finished output."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fastvlm.captioning.ledger import encode, read_lines
from fastvlm.captioning.sources import Item, Source

# samples of a shard made of a folder
SAMPLES = 1000


def write_shards(source: Source, out: Path, folder: Path, samples: int = SAMPLES) -> int:
    """A shard for each of the source's shards, or for samples pictures of a folder.

    A sample: the picture's file as it is, <key>.json with the lines of the output, and, where there
    is one line, <key>.txt with its text. Pictures that could not be read are left out. A shard is
    written beside its place and renamed; one that is there already was whole, and is made anew.
    Returns how many samples are in them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = _places(out)
    written = 0
    with open(out, "rb") as lines:
        for name, items in _groups(source, samples):
            new = folder / f".{name}.new"
            try:
                with tarfile.open(new, "w") as shard:
                    for item in items:
                        written += _add(shard, item, lines, places.get(item.path, ()))
                os.replace(new, folder / name)
            finally:
                new.unlink(missing_ok=True)
    return written


def _places(out: Path) -> dict[str, list[int]]:
    """By path, where its lines begin."""
    places: dict[str, list[int]] = {}
    begin = 0
    for end, line in read_lines(out):
        if "error" not in line:
            places.setdefault(line["path"], []).append(begin)
        begin = end
    return places


def _groups(source: Source, samples: int) -> Iterator[tuple[str, Iterator[Item]]]:
    if source.shards:
        names: dict[str, int] = {}
        for path in source.shards:
            name = os.path.basename(path)
            names[name] = number = names.get(name, 0) + 1
            stem = name.removesuffix(".tar")
            yield (name if number == 1 else f"{stem}-{number}.tar"), Source([path]).items()
        return
    items, number = source.items(), 0
    while batch := list(islice(items, samples)):
        yield f"{number:06}.tar", iter(batch)
        number += 1


def _add(shard: tarfile.TarFile, item: Item, lines: Any, begins: Any) -> int:
    """One sample, or none where nothing is known of it."""
    said = []
    for begin in begins:
        lines.seek(begin)
        said.append(json.loads(lines.readline()))
    if not said:
        return 0
    key = key_of(item)
    members = {item.suffix.lstrip("."): item.read()}
    if len(said) == 1:
        members["txt"] = said[0]["text"].encode()
    members["json"] = encode(said)
    for suffix, data in members.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        shard.addfile(info, io.BytesIO(data))
    return 1


def key_of(item: Item) -> str:
    """The sample's key: of a shard its own; of a file its path, whose dots would end a key early.

    The suffix stays in it, as a.jpg and a.png are two samples.
    """
    if item.size >= 0:
        return item.path
    folder, _, name = item.path.lstrip("/").rpartition("/")
    name = name.replace(".", "_")
    return f"{folder}/{name}" if folder else name
