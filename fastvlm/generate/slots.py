"""Cross-attention's keys and values of images that come and go, each in a place of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Slots:
    """Places for images in the layers of a shared cross cache, which holds one.

    A place has room for `size` keys; of an image with fewer the rest is an image that nobody reads
    (`Layout`), so that place p is image 2 p. latest: the places that were filled last.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        (self.size,) = self.layers[0].layout.kv_lengths
        self._lengths = [self.size]
        self._free: list[int] = []
        self.latest = [0]

    @property
    def kv_lengths(self) -> tuple[int, ...]:
        return tuple(part for n in self._lengths for part in (n, self.size - n))

    def images_of(self, places: Sequence[int]) -> list[int]:
        return [2 * place for place in places]

    def put(self, layers: Sequence[Any]) -> bool:
        """Keep what these layers hold; whether that took other tensors than there were."""
        lengths = layers[0].layout.kv_lengths
        grows = max(lengths) > self.size or len(lengths) > len(self._free)
        if grows:
            self._grow(max(self.size, *lengths), len(lengths) - len(self._free))
        self._free.sort(reverse=True)
        self.latest = [self._free.pop() for _ in lengths]
        for place, length in zip(self.latest, lengths):
            self._lengths[place] = length
        for mine, theirs in zip(self.layers, layers):
            for kept, new in zip(mine.packed, theirs.packed):
                for place, part in zip(self.latest, new.split(list(lengths))):
                    kept[place * self.size : place * self.size + part.shape[0]] = part
        return grows

    def _grow(self, size: int, more: int) -> None:
        """Places of at least this size, and so many more of them, or twice as many."""
        count = len(self._lengths)
        total = count if more <= 0 else max(count + more, 2 * count)
        for layer in self.layers:
            layer.packed = tuple(self._moved(x, size, total) for x in layer.packed)
        self._free += range(count, total)
        self._lengths += [0] * (total - count)
        self.size = size

    def _moved(self, x: Tensor, size: int, total: int) -> Tensor:
        new = x.new_empty(total * size, *x.shape[1:])
        new.unflatten(0, (total, size))[: len(self._lengths), : self.size] = x.unflatten(
            0, (len(self._lengths), self.size)
        )
        return new

    def free(self, place: int) -> None:
        """Nobody reads it any more."""
        self._lengths[place] = 0
        self._free.append(place)
