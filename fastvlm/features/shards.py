"""The folder: features.json says of what the features are, and each shard holds some, for good.

A shard is a safetensors file with features [n, ...], keys uint8 [n, 32] and checksums int64 [n]. It
is written under another name, synced and renamed, and never touched again: whoever is killed while
writing leaves what was there before, and any number of processes may read and write at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvlm.checks import fail
from fastvlm.features.identity import OP, Identity
from fastvlm.features.keys import BYTES, bytes_of

ABOUT = "features.json"
_ENDING = ".safetensors"
_OPEN_AT_ONCE = 64


class Shards:
    """The shards of one folder, as one process sees them. ValueError: the folder is no such one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[bytes, tuple[str, int]] = {}
        self._seen: set[str] = set()
        self._open: OrderedDict[str, Any] = OrderedDict()

    def about(self) -> Identity | None:
        """What features.json says; None where nothing was kept yet."""
        try:
            text = (self.folder / ABOUT).read_text()
        except FileNotFoundError:
            if self.folder.is_dir() and any(self._names()):
                wanted = f"a folder whose {ABOUT} is there beside its shards"
                raise fail(OP, "folder", wanted, str(self.folder)) from None
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise self._unreadable(str(error)) from error
        try:
            found = json.loads(text)
        except ValueError as error:
            raise self._unreadable(f"no JSON: {error}") from None
        if not isinstance(found, dict) or "weights" not in found:
            raise self._unreadable("it says nothing of weights")
        return found

    def _unreadable(self, why: str) -> ValueError:
        wanted = f"a folder whose {ABOUT} can be read ({why}); remove the folder to begin anew"
        return fail(OP, "folder", wanted, str(self.folder))

    def found(self, identity: Identity) -> Identity:
        """Write features.json, or leave that of whoever was first; what stands there now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        data = json.dumps(identity, indent=1).encode()
        with self._written(data) as path, contextlib.suppress(FileExistsError):
            os.link(path, self.folder / ABOUT)
        about = self.about()
        assert about is not None
        return about

    @contextlib.contextmanager
    def _written(self, data: bytes) -> Iterator[Path]:
        path = self._part()
        try:
            path.write_bytes(data)
            _sync(path)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _part(self) -> Path:
        return self.folder / f".{uuid.uuid4().hex}.{socket.gethostname()}.{os.getpid()}.part"

    def add(self, of: str, features: Tensor, keys: Sequence[bytes]) -> None:
        """One shard more, of features [n, ...]. of: the digest of their identity.

        OSError: it could not be written.
        """
        from safetensors.torch import save_file

        part = self._part()
        tensors = {
            "features": features.contiguous(),
            "keys": torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).copy()).view(
                -1, BYTES
            ),
            "checksums": torch.tensor([zlib.crc32(bytes_of(row)) for row in features]),
        }
        try:
            save_file(tensors, part, metadata={"of": of})
            _sync(part)
            name = f"{uuid.uuid4().hex}{_ENDING}"
            os.rename(part, self.folder / name)
            _sync(self.folder)
        except OSError:
            raise
        except Exception as error:  # safetensors has an exception of its own for a full disk
            raise OSError(f"{self.folder}: {error}") from error
        finally:
            part.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what killed processes of this machine left half written."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                *_, host, pid, ending = f"..{entry.name}".rsplit(".", 3)
                if ending == "part" and host == socket.gethostname() and not _is_alive(pid):
                    os.unlink(entry.path)

    def _names(self) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.folder):
                if name.endswith(_ENDING):
                    yield name

    def look(self, of: str) -> None:
        """Read the keys of shards that were not there before. of: the digest of their identity."""
        for name in sorted(set(self._names()) - self._seen):
            self._seen.add(name)
            try:
                shard = self._shard(name)
                keys = shard.get_tensor("keys").numpy()
                told = (shard.metadata() or {}).get("of")
                rows = shard.get_slice("features").get_shape()[0]
                if keys.shape != (rows, BYTES) or keys.dtype != np.uint8:
                    raise ValueError("its keys do not fit its features")
            except Exception as error:
                self._leave_out(name, error)
                continue
            if told != of:
                wanted = f"a folder in which all shards are of its {ABOUT}; {name} is of others"
                raise fail(OP, "folder", wanted, str(self.folder))
            for row, key in enumerate(keys):
                self._where.setdefault(key.tobytes(), (name, row))

    def _leave_out(self, name: str, error: object) -> None:
        self._open.pop(name, None)
        self._where = {key: at for key, at in self._where.items() if at[0] != name}
        warnings.warn(
            f"fastvlm.{OP}: {self.folder / name} cannot be read ({error}); what it held is "
            "computed again, and the file may be removed",
            stacklevel=2,
        )

    def _shard(self, name: str) -> Any:
        """A shard, mapped into memory; the least recently used are closed."""
        from safetensors import safe_open

        if name in self._open:
            self._open.move_to_end(name)
        else:
            self._open[name] = safe_open(self.folder / name, framework="pt")
            if len(self._open) > _OPEN_AT_ONCE:
                self._open.popitem(last=False)
        return self._open[name]

    def __len__(self) -> int:
        return len(self._where)

    def has(self, key: bytes) -> bool:
        return key in self._where

    def read(self, key: bytes) -> Tensor | None:
        """The features of one key, a copy; None where they are not there, or no longer whole."""
        if key not in self._where:
            return None
        name, row = self._where[key]
        try:
            shard = self._shard(name)
            features: Tensor = shard.get_slice("features")[row : row + 1][0]
            checksum = int(shard.get_slice("checksums")[row : row + 1][0])
            if zlib.crc32(bytes_of(features)) != checksum:
                raise ValueError("its bytes are not those that were written")
        except Exception as error:
            self._leave_out(name, error)
            return None
        return features


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True
