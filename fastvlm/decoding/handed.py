"""Copies of what a cache holds, in the hands of who asked for its keys and values.

transformers gives the tensors themselves, so that what is written into them is read by the next
step. Ours are copies where rows share an image, have changed places or have padding: the next step
asks what was written into them.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import Tensor

from fastvlm.compat import pytorch


class _Copy(NamedTuple):
    layer: Any
    tensor: weakref.ref[Tensor]
    held: Tensor | None  # until a step has looked at it: nobody else may keep it
    version: int | None


class HandedOut:
    """The copies of the layers of one cache. Copied or saved it is empty."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, str], _Copy] = {}

    def __reduce__(self) -> Any:
        return HandedOut, ()

    def __bool__(self) -> bool:
        return bool(self._copies)

    def get(self, layer: Any, name: str) -> Tensor | None:
        """The copy of a layer's keys or values that is about, to be given again."""
        found = self._copies.get((id(layer), name))
        return None if found is None else found.tensor()

    def add(self, layer: Any, name: str, tensor: Tensor) -> Tensor:
        version = pytorch.version_of(tensor)
        self._copies[id(layer), name] = _Copy(layer, weakref.ref(tensor), tensor, version)
        return tensor

    def written(self) -> list[tuple[Any, str, Tensor]]:
        """Layer, name and copy of those that were written into since they were asked for, or since
        the last time; those of inference_mode, which counts no writes, all. One that nobody keeps
        is let go of."""
        found = []
        for key, copy in list(self._copies.items()):
            tensor = copy.tensor()
            if tensor is None:
                del self._copies[key]
                continue
            version = pytorch.version_of(tensor)
            if version is None or version != copy.version:
                found.append((copy.layer, key[1], tensor))
            self._copies[key] = copy._replace(held=None, version=version)
        return found

    def forget(self) -> None:
        """What is written into them from now on is not the cache's."""
        self._copies = {}
