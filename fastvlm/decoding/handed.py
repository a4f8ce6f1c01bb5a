"""What a cache hands out to who asks for its keys and values, and what is written into that.

transformers gives the tensors themselves, so that the next step reads what was written into them.
Ours are copies where rows share an image, have changed places or have padding.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastvlm.compat import pytorch


class Layer(Protocol):
    def take_back(self, name: str, copy: Tensor) -> None:
        """Hold what somebody may have written into a copy of the keys or values of now, or say why
        that cannot be."""

    def renew(self) -> None:
        """The same of what was written into the tensors themselves."""


class _Copy(NamedTuple):
    layer: weakref.ref[Any]
    name: str
    tensor: weakref.ref[Tensor]
    held: Tensor | None  # until it has been looked at: nobody else may keep it
    version: int | None


class HandedOut:
    """What the layers of one cache have handed out. Whoever reads the cache, changes its rows or
    copies it settles that first; a copy of a cache has handed out nothing."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, str], _Copy] = {}
        self._shown: weakref.WeakSet[Any] = weakref.WeakSet()

    def __reduce__(self) -> Any:
        self.settle()
        return HandedOut, ()

    def copy_of(self, layer: Layer, name: str) -> Tensor | None:
        """The copy of a layer's keys or values that is about, to be given again."""
        found = self._copies.get((id(layer), name))
        return None if found is None or found.layer() is not layer else found.tensor()

    def copied(self, layer: Layer, name: str, tensor: Tensor) -> Tensor:
        self._copies[id(layer), name] = _Copy(
            weakref.ref(layer), name, weakref.ref(tensor), tensor, None
        )
        return tensor

    def shown(self, layer: Layer, tensor: Tensor) -> Tensor:
        """A view of what the layer holds."""
        self._shown.add(layer)
        return tensor

    def settle(self) -> None:
        """Let the layers take back what may have been written: all copies at the first look, as
        writes through ``.data`` or NumPy are not counted, later those that were written into."""
        if not self._copies and not self._shown:
            return
        for key, copy in list(self._copies.items()):
            layer, tensor = copy.layer(), copy.tensor()
            if layer is None or tensor is None:
                del self._copies[key]
                continue
            version = pytorch.version_of(tensor)
            if copy.version is None or version != copy.version:
                layer.take_back(copy.name, tensor)
            self._copies[key] = copy._replace(held=None, version=version)
        for layer in self._shown:
            layer.renew()

    def forget(self) -> None:
        """What is written into copies from now on is not the cache's."""
        self._copies = {}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same, NaN for NaN."""
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
