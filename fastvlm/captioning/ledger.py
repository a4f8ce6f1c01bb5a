"""The output: lines of JSON that stay whole whatever happens, and what they say is done."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastvlm.usage import UsageError

try:
    import fcntl
except ModuleNotFoundError:  # Windows: nothing says there that somebody else writes the file
    fcntl = None  # type: ignore[assignment]

Key = tuple[str, str, "str | None"]


class LedgerError(Exception):
    """The output cannot be written any more; what it holds is whole."""


def key_of(line: dict[str, Any]) -> Key:
    """What a line is known by: path, task, language."""
    return line["path"], line["task"], line["language"]


def encode(line: dict[str, Any] | list[dict[str, Any]]) -> bytes:
    """One line, UTF-8; names that are no UTF-8 as escaped surrogates."""
    text = json.dumps(line, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(line).encode() + b"\n"


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset behind it, line) of each whole line, up to one that was not written to its end.

    UsageError: a line in the middle that is none of ours.
    """
    end = 0
    with open(path, "rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            try:
                line = json.loads(raw)
                key_of(line)
            except (ValueError, KeyError, TypeError):
                if not file.read(1):
                    return  # a disk that was full may have left zeros behind
                wanted = "a file that this command wrote"
                raise UsageError("--out", wanted, f"{path}, another line at byte {end}") from None
            end += len(raw)
            yield end, line


class Ledger:
    """An output file that is appended to; one process at a time.

    A batch of lines is written at once or, where the disk is full, not at all.
    UsageError: the file cannot be opened, or somebody else writes it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            given = f"{path} ({error.strerror})"
            raise UsageError("--out", "a file that can be written", given) from None
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            wanted = "a file that no other process is writing"
            raise UsageError("--out", wanted, str(path)) from None
        self._end = os.lseek(self._file, 0, os.SEEK_END)

    def cut(self, end: int) -> None:
        """Leave out what stands behind this byte: a line that was not written to its end."""
        os.ftruncate(self._file, end)
        self._end = os.lseek(self._file, end, os.SEEK_SET)

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """LedgerError: there is no room for them; the file is then as it was."""
        data = memoryview(b"".join(encode(line) for line in lines))
        try:
            done = 0
            while done < len(data):
                done += os.write(self._file, data[done:])
        except OSError as error:
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)
            raise LedgerError(f"{self.path}: {error.strerror}") from error
        self._end += len(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a pipe, a device
            os.fsync(self._file)
        os.close(self._file)


def parts_of(out: str | Path) -> list[str]:
    """The files that several processes wrote beside an output, whose merging has not happened."""
    return sorted(glob.glob(f"{glob.escape(str(out))}.part-*"))


class Done:
    """What the output files of earlier runs hold: which keys, and where the whole lines end.

    retry: lines with an error do not count. Keys are kept as hashes of 8 bytes, so that millions
    of them take little.
    """

    def __init__(self, retry: bool) -> None:
        self.retry = retry
        self.models: set[tuple[str, str | None]] = set()
        self.failed = 0
        self._keys: set[int] = set()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: Key) -> bool:
        return _digest(key) in self._keys

    def add(self, *key: str | None) -> bool:
        """Whether it is new."""
        digest = _digest(key)
        if digest in self._keys:
            return False
        self._keys.add(digest)
        return True

    def read(self, path: str | Path) -> int:
        """Take in one file; returns where its whole lines end."""
        whole = 0
        for end, line in read_lines(path):
            whole = end
            self.models.add((line.get("model", ""), line.get("revision")))
            if "error" in line:
                self.failed += 1
                if self.retry:
                    continue
            self._keys.add(_digest(key_of(line)))
        return whole


def _digest(key: tuple[str | None, ...]) -> int:
    data = json.dumps(key).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def rewrite(out: str | Path, files: Iterable[str | Path], keep_errors: bool) -> None:
    """The lines of these files, each key once, in one file that takes the place of out.

    It is written beside out and renamed, so out is always the one or the other.
    """
    new = Path(f"{out}.new")
    seen: set[int] = set()
    try:
        with open(new, "wb") as file:
            for path in files:
                for _, line in read_lines(path):
                    digest = _digest(key_of(line))
                    if digest in seen or ("error" in line and not keep_errors):
                        continue
                    seen.add(digest)
                    file.write(encode(line))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, out)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise LedgerError(f"{new}: {error.strerror}") from error
