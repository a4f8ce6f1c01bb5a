"""Where a checkpoint lies: a folder of this machine, or a commit of a hub's repository."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm.loading.errors import LoadError, first_line

_SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]  # configs, tokenizers, the index of shards


@dataclass(frozen=True)
class Source:
    """A checkpoint's small files in a folder, its other files on request.

    id: as the user gave it. commit: of a hub's repository; None for a folder.
    hub: revision, local_files_only, token, cache_dir, as transformers' from_pretrained takes them.
    """

    id: str
    folder: Path
    commit: str | None
    hub: dict[str, Any] = field(default_factory=dict)

    def file(self, name: str) -> Path | None:
        """A file of the checkpoint, downloaded if need be; None where it has none of that name."""
        path = self.folder / name
        if path.is_file():
            return path
        if self.commit is None:
            return None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(self.id, name, **{**self.hub, "revision": self.commit}))
        except EntryNotFoundError:  # with local_files_only too
            return None
        except Exception as error:  # a broken connection has many types
            raise LoadError(self.id, f"{name} cannot be fetched ({first_line(error)})") from error

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file; None where there is none. LoadError: it is not JSON, or no object."""
        path = self.file(name)
        if path is None:
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise LoadError(path, f"must be JSON; it is not ({first_line(error)})") from error
        if not isinstance(value, dict):
            raise LoadError(path, f"must hold a JSON object; got {type(value).__name__}")
        return value

    def config(self) -> dict[str, Any]:
        """What config.json says. LoadError: there is none."""
        found = self.json("config.json")
        if found is None:
            names = sorted(path.name for path in self.folder.iterdir())[:5]
            held = f"it holds {', '.join(names)}" if names else "it is empty"
            raise LoadError(self.id, f"config.json must lie in it; {held}")
        return found

    def again(self) -> dict[str, Any]:
        """Arguments with which transformers finds the same commit under the id."""
        return {} if self.commit is None else {**self.hub, "revision": self.commit}

    def has(self, *beginnings: str) -> bool:
        """Whether a small file's name begins with one of these."""
        return any(path.name.startswith(beginnings) for path in self.folder.iterdir())


def find(path_or_id: str | os.PathLike[str], **hub: Any) -> Source:
    """The checkpoint of a folder or of an id ("owner/name"); a hub's small files are fetched.

    LoadError: no folder there, and no such id, or it cannot be reached.
    """
    name = os.fspath(path_or_id)
    hub = {key: value for key, value in hub.items() if value is not None}
    folder = Path(name)
    if folder.is_dir():
        return Source(name, folder, None, hub)
    if folder.exists():
        raise LoadError(name, "must be a folder with config.json and weights; it is a file")
    if folder.is_absolute() or name.count("/") > 1 or name.startswith("."):
        raise LoadError(name, "must be a folder, or a model's id such as owner/name; it is neither")
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(name, allow_patterns=_SMALL, **hub))
    except Exception as error:  # no such id, no network, no rights: each library has its own
        wanted = "must be a folder, or a model's id that can be fetched"
        raise LoadError(name, f"{wanted} ({first_line(error)})") from error
    return Source(name, snapshot, snapshot.name, hub)
