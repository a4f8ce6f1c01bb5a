"""Samples of shards by number, in any order: what a run that resumes needs."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

from fastvlm.florenz.data.shards import PICTURES, DataError, ShardSamples, decoded_picture


class IndexedShards(ShardSamples):
    """Samples of shards as a sequence; texts are read at once, pictures when they are asked for.

    What cannot be used is skipped and named by `tally`, or raises DataError with strict. Shards
    must be files that are not compressed. DataError: no sample at all, and later a picture that
    does not decode.
    """

    def __init__(self, source: Path | str, *, strict: bool = False) -> None:
        super().__init__(source, strict=strict)
        self._rows: list[tuple[Path, int, int, dict[str, Any]]] = []
        for shard in self.shards:
            for name, files in self._files(shard):
                sample = self._sample(name, files, decode=False)
                if sample is not None:
                    offset, size = next(files[ending] for ending in PICTURES if ending in files)
                    self.tally.samples += 1
                    self._rows.append((shard, offset, size, sample))
        if not self._rows:
            what, why = (self.tally.skipped or [(str(source), "nothing in it")])[0]
            raise DataError(f"{source} has no sample that can be used: {what}: {why}")

    def _open(self, shard: Path) -> tarfile.TarFile:
        return tarfile.open(shard, "r:")  # where a file lies in a compressed one, nobody can seek

    def _read(self, tar: tarfile.TarFile, entry: tarfile.TarInfo, ending: str) -> Any:
        if ending not in PICTURES:
            return super()._read(tar, entry, ending)
        return entry.offset_data, entry.size

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        shard, offset, size, sample = self._rows[number]
        with shard.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        try:
            return {**sample, "image": decoded_picture(content)}
        except DataError as error:
            raise DataError(f"{sample['image_id']}: {error}") from None
