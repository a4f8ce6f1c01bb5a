"""What is kept, as one process reads and fills it: the shards, and what waits to become one."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvlm.features.identity import OP, Identity, differences, digest
from fastvlm.features.shards import Shards

# a shard is written when so much waits, or something has waited so long
SHARD_BYTES = 64 * 2**20
SECONDS = 60.0


class Store:
    """A folder of features that are of one identity. Threads may share it; a copy that is pickled,
    or comes about by fork, reads the same folder and has nothing waiting.

    ValueError: the folder's features are of something else. fill: whether to keep more.
    """

    def __init__(self, folder: Path, identity: Identity, fill: bool) -> None:
        self.folder, self.identity, self.fill = folder, identity, fill
        self.about: Identity | None = None
        self.of = ""
        self._begin()
        self._look()
        if self.about is not None:
            self._shards.sweep()

    def _begin(self) -> None:
        """What belongs to one process."""
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._shards = Shards(self.folder)
        self._waiting: dict[bytes, Tensor] = {}
        self._since = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {name: v for name, v in vars(self).items() if name in _SHARED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._pid != os.getpid():  # a forked worker: the lock and the shards are its parent's
            self._begin()
        with self._lock:
            yield

    def _look(self) -> None:
        """What other processes have kept meanwhile."""
        if self.about is None and (about := self._shards.about()) is not None:
            self._take(about)
        if self.about is not None:
            self._shards.look(self.of)

    def _take(self, about: Identity) -> None:
        """What the folder's features are of: this identity, and the arithmetic of the first."""
        kept = {name: value for name, value in about.items() if name != "arithmetic"}
        if found := differences(kept, self.identity):
            raise ValueError(
                f"fastvlm.{OP}: folder must be one of this tower and transform, or a new one; got "
                f"{str(self.folder)!r}, whose features were kept with {'; '.join(found)}"
            )
        self.about, self.of = about, digest(about)

    def __len__(self) -> int:
        with self._locked():
            self._look()
            return len(self._shards) + len(self._waiting)

    @property
    def arithmetic(self) -> str | None:
        """In which the features were computed; None before the first."""
        return None if self.about is None else self.about["arithmetic"]

    def rows(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        """What is kept of these."""
        with self._locked():
            if not all(self._shards.has(key) or key in self._waiting for key in keys):
                self._look()
            found: dict[bytes, Tensor] = {}
            for key in keys:
                row = self._waiting.get(key)
                row = self._shards.read(key) if row is None and key not in found else row
                if row is not None:
                    found[key] = row
            return found

    def keep(self, rows: Mapping[bytes, Tensor], arithmetic: str) -> None:
        """Keep some more, all of one shape, computed in this arithmetic."""
        if not self.fill or not rows:
            return
        with self._locked():
            if self.about is None:
                try:
                    self._take(self._shards.found({**self.identity, "arithmetic": arithmetic}))
                except OSError as error:
                    self._give_up(error)
                    return
            if self.arithmetic not in (arithmetic, "float32"):
                return  # another process was first; the next call says so
            shape = next(iter(rows.values())).shape
            if any(row.shape != shape for row in self._waiting.values()):
                self.flush()
            self._since = self._since if self._waiting else time.monotonic()
            self._waiting.update({key: row.clone() for key, row in rows.items()})
            if sum(row.nbytes for row in self._waiting.values()) >= SHARD_BYTES:
                self.flush()

    def flush(self, seconds: float = 0.0) -> None:
        """Write what has waited so long."""
        with self._locked():
            if not self._waiting or time.monotonic() - self._since < seconds:
                return
            waiting, self._waiting = self._waiting, {}
            assert self.about is not None
            try:
                self._shards.look(self.of)
                new = {key: row for key, row in waiting.items() if not self._shards.has(key)}
                if new:
                    self._shards.add(self.of, torch.stack(list(new.values())), list(new))
                    self._shards.look(self.of)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.fill = False
        warnings.warn(
            f"fastvlm.{OP}: {self.folder} cannot be written to ({error}); it goes on without "
            "keeping any more features",
            stacklevel=2,
        )


_SHARED = ("folder", "identity", "fill", "about", "of")
