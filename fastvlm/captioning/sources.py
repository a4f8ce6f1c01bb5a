"""Where pictures come from: folders, single files, and WebDataset shards, one after the other."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import islice
from pathlib import Path

from fastvlm.usage import UsageError

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Item:
    """One picture. path: relative to its folder with "/", or the sample's key in its shard.

    file: the picture's file or its shard; offset, size: where it lies in the shard (size -1: the
    whole file). suffix: of the picture's file, with the dot.
    """

    path: str
    file: str
    suffix: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The bytes of the picture's file. OSError: it cannot be read, or is shorter by now."""
        with open(self.file, "rb") as opened:
            if self.size < 0:
                return opened.read()
            opened.seek(self.offset)
            data = opened.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.file} ends within the picture")
        return data


class Source:
    """All pictures of some paths, in an order that is the same every time.

    paths: folders, searched with all below them; picture files; `.tar` shards, also as
    "shards/{0000..0099}.tar" or "shards/*.tar". Hidden files and folders are left out. A link to a
    folder is followed, but no folder is searched twice.
    UsageError: nothing there, folders beside other things, shards beside files.
    """

    def __init__(self, paths: Sequence[str], argument: str = "SOURCE") -> None:
        expanded = [found for path in paths for found in _expanded(path, argument)]
        self.folder: str | None = None
        self.shards: list[str] = []
        self.files: list[str] = []
        for path in expanded:
            if os.path.isdir(path):
                if len(expanded) > 1:
                    wanted = "one folder, or files, or shards, not a folder beside others"
                    raise UsageError(argument, wanted, ", ".join(expanded[:4]))
                self.folder = path
            elif not os.path.isfile(path):
                raise UsageError(argument, "a folder, a picture or a .tar that is there", path)
            elif path.lower().endswith(".tar"):
                self.shards.append(path)
            else:
                self.files.append(path)
        self.files = list(dict.fromkeys(self.files))
        self.shards = list(dict.fromkeys(self.shards))
        if self.shards and self.files:
            raise UsageError(argument, "pictures or shards, not both", ", ".join(expanded[:4]))

    def items(
        self, rank: int = 0, world: int = 1, warn: Warn = lambda text: None
    ) -> Iterator[Item]:
        """This rank's pictures: whole shards where there are enough, else every world-th."""
        found: Iterator[Item]
        first, every = rank, world
        if self.shards:
            shards = self.shards
            if len(shards) >= world:
                shards, first, every = shards[rank::world], 0, 1
            found = (item for shard in shards for item in _in_shard(shard, warn))
        elif self.folder is not None:
            found = _walk(self.folder, "", picture_suffixes(), set(), warn)
        else:
            found = map(_file, self.files)
        yield from islice(found, first, None, every)


def picture_suffixes() -> frozenset[str]:
    """Of the formats that Pillow can open."""
    from PIL import Image

    Image.init()
    # PDF, PostScript and MPEG are written, or shown by other programs, not pictures of a data set
    left_out = {".pdf", ".ps", ".eps", ".mpg", ".mpeg"}
    suffixes = Image.registered_extensions().items()
    return frozenset(s for s, kind in suffixes if kind in Image.OPEN) - left_out


def _expanded(path: str, argument: str) -> list[str]:
    """Braces ({000..012}, {a,b}) and stars, unless a file has that very name."""
    if os.path.exists(path):
        return [path]
    found: list[str] = []
    for one in _braces(path):
        matches = sorted(glob(one)) if has_magic(one) else [one]
        if not matches:
            raise UsageError(argument, "a pattern that something matches", path)
        found += matches
    return found


def _braces(path: str) -> list[str]:
    """As WebDataset writes shards: {first..last}, with leading zeros, or {one,two}."""
    before, opening, rest = path.partition("{")
    inside, closing, after = rest.partition("}")
    if not opening or not closing:
        return [path]
    first, dots, last = inside.partition("..")
    if dots and first.isdigit() and last.isdigit():
        width = len(first) if first.startswith("0") else 0
        middles = [str(n).zfill(width) for n in range(int(first), int(last) + 1)]
    else:
        middles = inside.split(",")
    return [before + middle + end for middle in middles for end in _braces(after)]


def _file(path: str) -> Item:
    return Item(Path(path).as_posix(), path, Path(path).suffix.lower())


def _walk(
    folder: str, prefix: str, known: frozenset[str], seen: set[tuple[int, int]], warn: Warn
) -> Iterator[Item]:
    try:
        status = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        warn(f"{prefix or folder}: {error.strerror}")
        return
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/", known, seen, warn)
            continue
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in known:  # a dead link too: its picture cannot be read, and that is said
            yield Item(prefix + entry.name, entry.path, suffix)


def _in_shard(shard: str, warn: Warn) -> Iterator[Item]:
    """The first picture of each sample; a shard that is cut off gives what lies before the cut."""
    known, last = picture_suffixes(), None
    try:
        with tarfile.open(shard, "r:") as opened:
            for member in opened:
                opened.members = []  # type: ignore[attr-defined]  # it would keep all of them
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem = name.partition(".")[0]
                suffix = os.path.splitext(name)[1].lower()
                key = f"{folder}/{stem}" if folder else stem
                if not stem or suffix not in known or key == last:
                    continue
                last = key
                yield Item(key, shard, suffix, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        warn(f"{shard}: {' '.join(str(error).split())}")
