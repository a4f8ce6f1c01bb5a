"""WebDataset shards: tar files with an image and its annotations side by side.

``000000012.png`` and ``000000012.json`` are one sample. Written and read with the standard library,
so that nothing has to be installed; the webdataset package reads the same files.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm.checks import fail
from fastvlm.florenz.data.annotations import Annotation, parsed, spelled_prompt

PICTURES = ("png", "jpg", "jpeg", "webp")
_OP = "florenz.data"


class DataError(ValueError):
    """A shard or a sample cannot be used."""


@dataclass
class Tally:
    """What reading came across. skipped: (which shard or sample, why), in the order read."""

    samples: int = 0
    groups: Counter[tuple[str, str]] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def write_shards(
    samples: Iterable[tuple[Any, list[Annotation]]],
    folder: Path | str,
    *,
    per_shard: int = 1000,
) -> list[Path]:
    """Write samples, (picture of Pillow, annotations), into shard-000000.tar and on; their paths.

    A shard is written under another name and renamed when it is whole: what stops in the middle
    leaves whole shards alone. Equal samples give equal bytes. ValueError: a folder that holds
    shards already, per_shard below 1.
    """
    folder = Path(folder)
    if type(per_shard) is not int or per_shard < 1:
        raise fail(_OP, "per_shard", "a whole number, 1 or more", per_shard)
    folder.mkdir(parents=True, exist_ok=True)
    if found := sorted(folder.glob("shard-*.tar")):
        raise fail(_OP, "folder", "one without shards", f"{folder} with {found[0].name}")
    paths: list[Path] = []
    tar: tarfile.TarFile | None = None
    try:
        for number, (image, annotations) in enumerate(samples):
            if number % per_shard == 0:
                _finish(tar, paths)
                paths.append(folder / f"shard-{len(paths):06d}.tar")
                tar = tarfile.open(f"{paths[-1]}.part", "w")  # noqa: SIM115 (closed when full)
            assert tar is not None
            picture = io.BytesIO()
            image.save(picture, "PNG")
            record = {"annotations": [annotation.record() for annotation in annotations]}
            text = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
            _add(tar, f"{number:09d}.png", picture.getvalue())
            _add(tar, f"{number:09d}.json", text)
        _finish(tar, paths)
    except BaseException:
        if tar is not None:
            tar.close()
        raise
    return paths


def _finish(tar: tarfile.TarFile | None, paths: list[Path]) -> None:
    if tar is not None:
        tar.close()
        Path(f"{paths[-1]}.part").replace(paths[-1])


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def shards_of(source: Path | str) -> list[Path]:
    """The shards of a folder in their order, or the one that is named.

    ValueError: no such folder or file, a folder without shards.
    """
    path = Path(source)
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.is_file() else []
    if not shards:
        raise fail(_OP, "source", "a shard, or a folder with shards (*.tar)", str(source))
    return shards


class ShardSamples(Iterable[dict[str, Any]]):
    """The samples of shards, in the form that `fastvlm.packing` takes; starts anew at each iter.

    A sample is ``{"image": RGB picture, "image_id": "shard-000000/000000012", "targets": [{"task",
    "language", "prompt", "text"}, ...]}``, prompts spelled out. What cannot be used is skipped, and
    `tally` says what and why: a damaged shard (from where it is damaged), a sample without picture
    or annotations, a picture that does not decode, an annotation without text, of a language or a
    task that nobody knows. strict: the first such thing raises DataError instead.
    Resumable: ``state_dict`` counts samples, `load_state_dict` goes on behind them.
    """

    def __init__(self, source: Path | str, *, strict: bool = False) -> None:
        self.shards, self.strict = shards_of(source), strict
        self.tally = Tally()
        self._first = 0

    def state_dict(self) -> dict[str, int]:
        return {"samples": self.tally.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._first = state["samples"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.tally, first, self._first = Tally(), self._first, 0
        for shard in self.shards:
            for name, files in self._files(shard):
                sample = self._sample(name, files, decode=self.tally.samples >= first)
                if sample is None:
                    continue
                self.tally.samples += 1
                if self.tally.samples > first:
                    yield sample

    def _skip(self, what: str, why: str) -> None:
        if self.strict:
            raise DataError(f"fastvlm.{_OP}: {what}: {why}")
        self.tally.skipped.append((what, why))

    def _files(self, shard: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """The files of each sample by their endings; neighbours of one name are one sample."""
        name, files = "", dict[str, Any]()
        try:
            with self._open(shard) as tar:
                for entry in tar:
                    if not entry.isfile():
                        continue
                    stem, _, ending = Path(entry.name).name.partition(".")
                    if stem != name and files:
                        yield f"{shard.stem}/{name}", files
                        files = {}
                    name, files[ending.lower()] = stem, self._read(tar, entry, ending.lower())
        except (tarfile.TarError, OSError, EOFError) as error:
            self._skip(str(shard), f"damaged: {type(error).__name__}: {error}")
            return
        if files:
            yield f"{shard.stem}/{name}", files

    def _open(self, shard: Path) -> tarfile.TarFile:
        return tarfile.open(shard)

    def _read(self, tar: tarfile.TarFile, entry: tarfile.TarInfo, ending: str) -> Any:
        """What is kept of a file of a sample: its bytes."""
        content: Any = tar.extractfile(entry)
        return content.read()

    def _sample(self, name: str, files: dict[str, Any], decode: bool) -> dict[str, Any] | None:
        try:
            targets = self._targets(name, files)
            picture = next((files[ending] for ending in PICTURES if ending in files), None)
            if picture is None:
                raise DataError(f"no picture (of {', '.join(PICTURES)})")
            image = decoded_picture(picture) if decode else None
        except DataError as error:
            self._skip(name, str(error))
            return None
        self.tally.groups.update((target["task"], target["language"]) for target in targets)
        return {"image": image, "image_id": name, "targets": targets}

    def _targets(self, name: str, files: dict[str, Any]) -> list[dict[str, str]]:
        if "json" not in files:
            raise DataError("no annotations (json)")
        try:
            records = json.loads(files["json"])["annotations"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"annotations do not read: {type(error).__name__}: {error}") from None
        targets = []
        for record in records if isinstance(records, list) else [records]:
            try:
                annotation = parsed(record)
            except ValueError as error:
                if self.strict:
                    raise DataError(str(error)) from None
                self._skip(name, str(error))
                continue
            targets.append({**annotation.record(), "prompt": spelled_prompt(annotation.prompt)})
        if not targets:
            raise DataError("no annotation that can be used")
        return targets


def decoded_picture(content: bytes) -> Any:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except OSError as error:
        raise DataError(f"the picture does not decode: {error}") from None
