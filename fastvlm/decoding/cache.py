"""The cross-attention cache of a patched model: K/V once per image, never expanded or reordered.

Which image a row reads is a table of the cache: where rows are reordered, repeated or selected, the
table is, and the keys and values stay.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from fastvlm.checks import describe
from fastvlm.compat import hf, pytorch
from fastvlm.decoding.handed import HandedOut, same
from fastvlm.layout import Layout, Padding
from fastvlm.nn.linear import original

DynamicLayer: Any = hf.cache_layer("DynamicLayer")

_NAMES = ("keys", "values")
# the module that filled a layer; beside the layers, not in them: a cache is copied, saved and kept
_FILLED_BY: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class Readers:
    """What all layers of one cross cache share: which image each row reads.

    layout: of the prefill. image_of: int64 [R], the image of each row; None where rows are still
    those of the prefill. in_groups: reordering changes places among the rows of an image only.
    seen: of a step in which rows see some of the keys, which (`fastvlm.run.seen`), and the mask
    that said so.
    """

    def __init__(self, in_groups: bool = False) -> None:
        self.layers = 0
        self.in_groups = in_groups
        self.handed = HandedOut()
        self.forget()

    def forget(self) -> None:
        self.layout: Layout | None = None
        self.image_of: Tensor | None = None
        self._mask: Tensor | None = None  # of the encoder, known to be the prefill's
        self._version: int | None = None  # of what is in it
        self._steps: dict[tuple[int, int], Layout] = {}
        self.seen: tuple[Any, Tensor | None] | None = None
        self.handed.forget()

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Other rows than there were: change gives theirs from a tensor [R, ...] of those now."""
        if self.layout is None:
            return
        self.handed.settle()
        now = self.layout.image_of.long() if self.image_of is None else self.image_of
        then = change(now)
        if then.shape != now.shape or not torch.equal(then, now):
            self.handed.forget()  # transformers' rows are others now too
            self.image_of, self._mask, self._steps, self.seen = then, None, {}, None

    def images(self, batch: int) -> list[int]:
        """The image of each of batch rows. ValueError where they are not as many as the cache's."""
        assert self.layout is not None
        rows = self._rows(self.layout, batch, None)
        return rows.tolist() if isinstance(rows, Tensor) else list(rows)

    def step(
        self, batch: int, length: int, mask: Tensor | None, image_of: Tensor | None = None
    ) -> Layout:
        """The layout of batch rows of length new tokens each, kept for the next step.

        mask: the encoder's, [images or batch, K], as at the prefill. image_of: what the caller says
        that its rows read. ValueError where the two do not fit the cache.
        """
        self.handed.settle()
        found = self._steps.get((batch, length))
        version = None if mask is None else pytorch.version_of(mask)
        if found is not None and mask is self._mask and version == self._version:
            return found
        layout = self.layout
        assert layout is not None
        rows = self._rows(layout, batch, image_of)
        self._check(layout, rows, mask)
        self._mask, self._version = mask, version
        if found is None:
            lengths = layout.kv_lengths
            found = Layout.from_lengths([length] * batch, lengths, rows, device=layout.device)
            grid = Padding(batch, length, None)
            found = replace(found, q_padding=grid, kv_padding=layout.kv_padding)
            self._steps[batch, length] = found
        return found

    def _rows(
        self, layout: Layout, batch: int, image_of: Tensor | None
    ) -> Tensor | tuple[int, ...]:
        """The image of each row: on the host while rows are as they were, so that no step waits."""
        rows: Tensor | tuple[int, ...] | None = self.image_of
        if rows is None:
            rows = layout.images if image_of is None else image_of
            images = layout.num_images
            if len(rows) != batch and image_of is None and images and batch % images == 0:
                # consecutive rows read one image, as transformers expands a batch
                rows = tuple(row // (batch // images) for row in range(batch))
        if len(rows) != batch:
            raise ValueError(
                f"fastvlm: input_ids must have {len(rows)} rows, as the cross-attention cache "
                f"has; got {batch}"
            )
        return rows

    def _check(self, layout: Layout, rows: Tensor | tuple[int, ...], mask: Tensor | None) -> None:
        grid = layout.kv_padding
        if grid is None or layout.device.type == "meta":
            return
        kept = torch.ones(grid.batch * grid.length, dtype=torch.bool, device=layout.device)
        if grid.index is not None:
            kept = torch.zeros_like(kept).index_fill(0, grid.index, True)
        kept = kept.view(grid.batch, grid.length)
        given = torch.ones_like(kept) if mask is None else mask != 0
        same = given.shape == kept.shape and torch.equal(given, kept)
        if not same or self.image_of is not None:
            each = kept[torch.as_tensor(rows, device=kept.device)]
            count = len(given)
            if count and each.shape[0] % count == 0:
                given = given.repeat_interleave(each.shape[0] // count, 0)
            same = given.shape == each.shape and torch.equal(given, each)
        if not same:
            raise ValueError(
                "fastvlm: attention_mask of a decoding step must hide what it hid at the prefill, "
                f"in each row what is padding of the prompt it reads now; got {describe(mask)}"
            )


class SharedCrossLayer(DynamicLayer):
    """Cross K/V of one decoder layer, packed [Tk, Hkv, D], whatever the number of readers.

    ``keys`` and ``values`` are transformers' view of it: [rows, Hkv, length, D], of each row the
    image that it reads.
    """

    def __init__(self, readers: Readers) -> None:
        super().__init__()
        self.readers = readers
        self.first = readers.layers == 0  # of the layers of its cache: it changes the table
        readers.layers += 1
        self.packed: tuple[Tensor, Tensor] | None = None
        self.layout: Layout | None = None
        self._chosen: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def fill(self, k: Tensor, v: Tensor, layout: Layout, module: torch.nn.Module) -> None:
        _FILLED_BY[self] = weakref.ref(module)
        self.packed, self.layout, self._chosen = (k, v), layout, None
        if self.first:
            self.readers.forget()
            self.readers.layout = layout
        self.dtype, self.device = k.dtype, k.device
        self.is_initialized = True

    def at_steps(self) -> tuple[Tensor, Tensor] | None:
        """What the rows of a step read: all keys and values, or those that all of them see."""
        index = None if self.readers.seen is None else self.readers.seen[0].keys
        if index is None or self.packed is None:
            return self.packed
        if self._chosen is None or self._chosen[0] is not index:
            k, v = self.packed
            self._chosen = index, (k.index_select(0, index), v.index_select(0, index))
        return self._chosen[1]

    def _padded(self, name: str) -> Tensor | None:
        if self.packed is None or self.layout is None:
            return None
        module = _FILLED_BY[self]() if self in _FILLED_BY else None
        if self._expands and module is not None and original(type(module)) is type(module):
            raise RuntimeError(
                "fastvlm: fastvlm.unpatch(model) came while this cache was in use: it holds the "
                "keys and values of an image once for all beams, which only a patched model reads; "
                "unpatch when generate() has returned"
            )
        handed = self.readers.handed
        copy = handed.copy_of(self, name)
        if copy is not None:
            return copy
        packed, rows = self.packed[_NAMES.index(name)], self._rows
        padded = self.layout.unpack_kv(packed).transpose(1, 2)
        padded = padded if rows is None else padded[rows]
        if pytorch.same_storage(padded, packed):
            return handed.shown(self, padded)
        return handed.copied(self, name, padded)

    @property
    def _expands(self) -> bool:
        """Whether rows that are still those of the prefill share images."""
        layout = self.layout
        assert layout is not None
        return self.readers.image_of is None and layout.num_segments != layout.num_images

    @property
    def _rows(self) -> Tensor | None:
        """int64 [R], the image of each row; None where each has its own, in order."""
        assert self.layout is not None
        return self.layout.image_of.long() if self._expands else self.readers.image_of

    def take_back(self, name: str, copy: Tensor) -> None:
        """copy [R, Hkv, length, D]: the packed keys become what was written into it. ValueError
        where rows that read one image would read other keys than each other."""
        assert self.packed is not None
        assert self.layout is not None
        packed, rows = self.packed[_NAMES.index(name)], self._rows
        theirs = images = copy.transpose(1, 2)
        if rows is not None:
            images = self.layout.unpack_kv(packed).clone()
            images[rows] = theirs
            # of several rows of an image one has been written: the others must agree but in padding
            real = self.layout.unpack_kv(packed.new_ones(packed.shape[:1]))[rows] != 0
            if not same(images[rows][real], theirs[real]):
                raise ValueError(
                    f"fastvlm: {name} of rows that read the same image must stay the same, as the "
                    "cache holds them once; decode with fastvlm.unpatch(model)"
                )
        written = self.layout.pack_kv(images)
        if not same(written, packed):
            packed.copy_(written)
            self.renew()

    def renew(self) -> None:
        """What a step reads of some keys is a copy: it becomes what they are now."""
        if self._chosen is None or self.packed is None:
            return
        index, chosen = self._chosen
        for some, each in zip(chosen, self.packed):
            some.copy_(each.index_select(0, index))

    @property
    def keys(self) -> Tensor | None:
        return self._padded("keys")

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        if value is not None:
            raise TypeError("fastvlm: a shared cross-attention layer is filled with fill()")

    @property
    def values(self) -> Tensor | None:
        return self._padded("values")

    @values.setter
    def values(self, value: Tensor | None) -> None:
        if value is not None:
            raise TypeError("fastvlm: a shared cross-attention layer is filled with fill()")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("fastvlm: a shared cross-attention layer is filled with fill()")

    def get_seq_length(self) -> int:
        if self.layout is None or self.layout.kv_padding is None:
            return 0
        return self.layout.kv_padding.length

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if not self.readers.in_groups:
            self._changed(lambda rows: rows[beam_idx.to(rows.device)])

    def reset(self) -> None:
        self.packed = self.layout = self._chosen = None
        self.is_initialized = False
        if self.first:
            self.readers.forget()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._changed(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._changed(lambda rows: rows[indices.to(rows.device)])

    def _changed(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.first:
            self.readers.change(change)


_IN_GROUPS = "fastvlm_in_groups"


@contextlib.contextmanager
def in_groups(cache: Any) -> Iterator[None]:
    """A loop whose rows change places among those of one image only: nothing is to be compared.

    cache: an EncoderDecoderCache, one that holds both kinds of layers (`interleave`) or may come
    to, or another, to which this says nothing.
    """
    cross = getattr(cache, "cross_attention_cache", cache)
    if not isinstance(cross, Cache):
        yield
        return
    cross.__dict__[_IN_GROUPS] = True
    if (readers := _readers_in(cross)) is not None:
        readers.in_groups = True
    try:
        yield
    finally:
        cross.__dict__.pop(_IN_GROUPS, None)
        if (readers := _readers_in(cross)) is not None:
            readers.in_groups = False


def _readers_in(cross: Cache) -> Readers | None:
    if is_shared(cross):
        return readers_of(cross)
    layers = hf.layers_of(cross)
    found = (layer.readers for layer in layers if isinstance(layer, SharedCrossLayer))
    return next(found, None)


def share(cross: Cache) -> None:
    """Turn a still empty cross-attention cache into a shared one, in place."""
    readers = Readers(cross.__dict__.get(_IN_GROUPS, False))
    hf.set_layer_maker(cross, partial(SharedCrossLayer, readers))


def interleave(cache: Cache, places: Sequence[int]) -> None:
    """Put layers for the keys of images at these places of a still empty cache of others."""
    readers = Readers(cache.__dict__.get(_IN_GROUPS, False))
    for place in places:
        cache.layers[place] = SharedCrossLayer(readers)


def is_shared(cross: Cache) -> bool:
    made = hf.layer_maker(cross)
    return isinstance(made, partial) and made.func is SharedCrossLayer


def readers_of(cross: Cache) -> Readers:
    """Which image each row of a shared cache reads."""
    readers: Readers = hf.layer_maker(cross).args[0]
    return readers


def layer_of(cross: Cache, index: int) -> SharedCrossLayer:
    while len(cross.layers) <= index:
        cross.layers.append(hf.layer_maker(cross)())
    layer: SharedCrossLayer = cross.layers[index]
    return layer


def cross_layer(cache: Any, index: int) -> SharedCrossLayer | None:
    """A layer's keys of images in a cache of a decoder; None where it keeps none."""
    if isinstance(cache, EncoderDecoderCache):
        return layer_of(cache.cross_attention_cache, index)
    layers = hf.layers_of(cache) if isinstance(cache, Cache) else ()
    layer = layers[index] if index < len(layers) else None
    return layer if isinstance(layer, SharedCrossLayer) else None
