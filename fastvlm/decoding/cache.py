"""The cross-attention cache of a patched model: K/V once per image, never expanded or reordered."""

from __future__ import annotations

import weakref
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from fastvlm.compat import hf
from fastvlm.layout import Layout
from fastvlm.nn.linear import original

DynamicLayer: Any = hf.cache_layer("DynamicLayer")

# the module that filled a layer; beside the layers, not in them: a cache is copied, saved and kept
_FILLED_BY: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class SharedCrossLayer(DynamicLayer):
    """Cross K/V of one decoder layer, packed [Tk, Hkv, D], whatever the number of readers.

    Beams of an image only change places among themselves, so reordering has nothing to do.
    ``keys`` and ``values`` are transformers' view of it: [images, Hkv, length, D].
    """

    def __init__(self) -> None:
        super().__init__()
        self.packed: tuple[Tensor, Tensor] | None = None
        self.layout: Layout | None = None

    def fill(self, k: Tensor, v: Tensor, layout: Layout, module: torch.nn.Module) -> None:
        _FILLED_BY[self] = weakref.ref(module)
        self.packed, self.layout = (k, v), layout
        self.dtype, self.device = k.dtype, k.device
        self.is_initialized = True

    def _padded(self, which: int) -> Tensor | None:
        if self.packed is None or self.layout is None:
            return None
        module = _FILLED_BY[self]() if self in _FILLED_BY else None
        shared = self.layout.num_segments != self.layout.num_images
        if shared and module is not None and original(type(module)) is type(module):
            raise RuntimeError(
                "fastvlm: fastvlm.unpatch(model) came while this cache was in use: it holds the "
                "keys and values of an image once for all beams, which only a patched model reads; "
                "unpatch when generate() has returned"
            )
        return self.layout.unpack_kv(self.packed[which]).transpose(1, 2)

    @property
    def keys(self) -> Tensor | None:
        return self._padded(0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        if value is not None:
            raise TypeError("fastvlm: a shared cross-attention layer is filled with fill()")

    @property
    def values(self) -> Tensor | None:
        return self._padded(1)

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
        pass

    def reset(self) -> None:
        self.packed = self.layout = None
        self.is_initialized = False

    def batch_repeat_interleave(self, repeats: int) -> None:
        pass

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError(
            "fastvlm: rows of a shared cross-attention cache cannot be selected one by one; "
            "decode this batch with fastvlm.unpatch(model)"
        )


def share(cross: Cache) -> None:
    """Turn a still empty cross-attention cache into a shared one, in place."""
    hf.set_layer_maker(cross, SharedCrossLayer)


def is_shared(cross: Cache) -> bool:
    return hf.layer_maker(cross) is SharedCrossLayer


def layer_of(cross: Cache, index: int) -> SharedCrossLayer:
    while len(cross.layers) <= index:
        cross.layers.append(SharedCrossLayer())
    layer: SharedCrossLayer = cross.layers[index]
    return layer
