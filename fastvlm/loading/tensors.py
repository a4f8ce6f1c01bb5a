"""The tensors of a checkpoint's files: names and shapes first, values when they are asked for."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvlm.loading.errors import LoadError, first_line, named
from fastvlm.loading.source import Source

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. read: its values, mapped from the file where the format allows it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    file: Path


def entries(source: Source) -> dict[str, Entry]:
    """Every tensor of a checkpoint by its name in the files; sharded or not, safetensors or .bin.

    LoadError: no weights, a shard that is missing, a file that is cut off or no tensor file, one
    that holds more than tensors.
    """
    for name, read in ((SAFETENSORS, _safetensors), (BIN, _bin)):
        index = source.json(f"{name}.index.json")
        if index is not None:
            return _shards(source, f"{name}.index.json", index, read)
        path = source.file(name)
        if path is not None:
            return dict(_checked(path, read))
    wanted = f"{SAFETENSORS} or {BIN}, or the index of their shards, must lie in it"
    raise LoadError(source.id, f"{wanted}; none does")


_Reader = Callable[[Path], Iterator[tuple[str, Entry]]]


def _shards(source: Source, name: str, index: dict[str, Any], read: _Reader) -> dict[str, Entry]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise LoadError(source.folder / name, "must have a weight_map of tensors to files")
    found: dict[str, Entry] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:  # never outside of the checkpoint
            raise LoadError(source.folder / name, f"names of shards must be plain; got {shard!r}")
        path = source.file(shard)
        if path is None:
            raise LoadError(source.id, f"{shard} must lie in it, {name} says; it does not")
        found.update(_checked(path, read))
    missing = sorted(set(places) - set(found))
    if missing:
        raise LoadError(source.id, f"its shards must hold what {name} says; not {named(missing)}")
    return found


def _checked(path: Path, read: _Reader) -> Iterator[tuple[str, Entry]]:
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise LoadError(path, "must be weights; it is a Git LFS pointer: run `git lfs pull`")
    return read(path)


def _safetensors(path: Path) -> Iterator[tuple[str, Entry]]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise LoadError(path, f"is cut off or no safetensors file ({first_line(error)})") from error
    for name in file.keys():  # noqa: SIM118 (it is no dict)
        shape = tuple(file.get_slice(name).get_shape())
        yield name, Entry(shape, lambda name=name: file.get_tensor(name), path)  # type: ignore[misc]


def _bin(path: Path) -> Iterator[tuple[str, Entry]]:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and not zipfile.is_zipfile(path):
        raise LoadError(path, "is cut off: the end of its archive is missing")
    try:
        # what torch.save wrote before 1.6 cannot be mapped
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        # torch goes on with advice to switch this off
        reason = first_line(error).split(". ")[0]
        wanted = "must hold tensors only, and is loaded with weights_only=True"
        raise LoadError(path, f"{wanted}; it holds other things or is cut off ({reason})") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise LoadError(
            path, f"is cut off or no file of torch.save ({first_line(error)})"
        ) from None
    if not isinstance(held, dict):
        wanted = "must hold a dict of names and tensors"
        raise LoadError(path, f"{wanted}; got {type(held).__name__}")
    for name, value in held.items():
        if not isinstance(value, Tensor):
            wanted = "must hold tensors by name, and nothing else"
            raise LoadError(path, f"{wanted}; {name!r} is a {type(value).__name__}")
        yield name, Entry(tuple(value.shape), lambda value=value: value, path)  # type: ignore[misc]
