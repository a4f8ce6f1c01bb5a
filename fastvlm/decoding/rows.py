"""The self-attention cache of a patched model: keys and values stay where they were written.

When beams change places, a table says which cache row holds each position of each beam
(`fastvlm.ops.cached_attention`, ``ancestry``), so that a reordering moves a few integers once for
all layers instead of every layer's keys and values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from fastvlm.compat import hf
from fastvlm.decoding.handed import HandedOut, same

DynamicLayer: Any = hf.cache_layer("DynamicLayer")

# positions that a cache has room for at first, beyond those of the prefill; then it doubles
ROOM = 64
# the same where generate() says how many it may need: rows mostly end before a limit in thousands
MOST_ROOM = 512


class Rows:
    """What all layers of one cache share.

    table: int32 [rows, capacity], the cache row of each position; a row writes to itself. lengths:
    int32 [rows], positions so far. moved: whether the table says anything. needed: the positions
    that generate() may come to, where that is known.
    """

    def __init__(self, needed: int | None = None) -> None:
        self.layers = 0
        self.needed = needed
        self.handed = HandedOut()
        self.before: Tensor | None = None  # the table, while rows are selected layer by layer
        self.forget()

    def forget(self) -> None:
        self.table: Tensor | None = None
        self.lengths: Tensor | None = None
        self.filled = 0
        self.moved = False
        self.handed.forget()

    def grown(self, rows: int, filled: int, capacity: int, device: torch.device) -> None:
        """Room for capacity positions, filled of which are there now (or will be in a moment)."""
        self.filled = filled
        if self.table is not None and _frozen(self.table):
            self.table = self.table.clone()
            self.lengths = None if self.lengths is None else self.lengths.clone()
        if self.table is None or self.lengths is None:
            self.table = _own(rows, capacity, device)
            self.lengths = torch.full((rows,), filled, dtype=torch.int32, device=device)
            return
        if self.table.shape[1] < capacity:
            # fewer rows than the cache has, where some have left
            more = _own(self.table.shape[0], capacity - self.table.shape[1], device)
            self.table = torch.cat([self.table, more], 1)
        self.lengths.fill_(filled)

    def let_go(self) -> None:
        """Copies of keys and values are the cache's no longer. NotImplementedError where somebody
        wrote into one."""
        self.handed.settle()
        self.handed.forget()

    def reorder(self, index: Tensor, begin: bool = False) -> None:
        """index: int64, the row of now that each row becomes. Of fewer rows the others leave:
        what they have written stays where it is, and nobody reads it any more. begin: some are -1,
        rows that come, and read nothing of what is there; there may be more than there were."""
        self.let_go()
        if self.table is None or self.lengths is None:
            return
        if begin or index.shape[0] != self.table.shape[0]:
            index = index.to(self.table.device)
            before = (
                self.table if self.table.shape[0] else self.table.new_empty(1, self.table.shape[1])
            )
            self.table = before.index_select(0, index.clamp_min(0))
            if begin:
                self.table[:, : self.filled].masked_fill_((index < 0).unsqueeze(1), -1)
            # what is written from now on is each row's own
            self.table[:, self.filled :] = _own(index.shape[0], 1, self.table.device)
            self.lengths = self.lengths.new_full((index.shape[0],), self.filled)
            self.moved = True
            return
        if _frozen(self.table):
            self.table = self.table.clone()
        now = self.table[:, : self.filled]
        now.copy_(now.index_select(0, index.to(now.device)))
        self.moved = True

    def drop(self, count: int) -> None:
        """The first count positions, which nobody reads, are given up."""
        if self.table is None or self.lengths is None:
            return
        kept = self.table[:, count : self.filled].clone()
        self.filled -= count
        self.table[:, : self.filled] = kept
        self.table[:, self.filled :] = _own(self.table.shape[0], 1, self.table.device)
        self.lengths.fill_(self.filled)

    @property
    def ancestry(self) -> Tensor | None:
        """The table of the positions so far; None where each row reads itself."""
        if not self.moved or self.table is None:
            return None
        return self.table[:, : self.filled]

    def restart(self) -> None:
        """A new table, for rows that each layer is about to put in order by the old one."""
        self.let_go()
        self.before = self.ancestry
        self.forget()


def _frozen(x: Tensor) -> bool:
    """Made under inference_mode, where it could be written to, and here it cannot."""
    return x.is_inference() and not torch.is_inference_mode_enabled()


def _own(rows: int, columns: int, device: torch.device) -> Tensor:
    numbers = torch.arange(rows, dtype=torch.int32, device=device)
    return numbers.unsqueeze(1).repeat(1, columns)


class RowLayer(DynamicLayer):
    """K/V of one layer, [rows, capacity, Hkv, D], written once.

    ``keys`` and ``values`` are transformers' view of it, in the order of the rows now: [rows, Hkv,
    length, D].
    """

    is_sliding = False

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self.first = rows.layers == 0  # of the layers of its cache: it keeps the table
        rows.layers += 1
        self.filled = 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [rows, L, Hkv, D] of new positions -> all of them, [rows, filled + L, Hkv, D]."""
        start = self.filled
        self.reserve(k.shape[1], k)
        return self.write(start, k, v)

    def reserve(self, count: int, like: Tensor | None = None) -> None:
        """Room for so many new positions, which count as filled: to be written at once.

        like: [rows, L, Hkv, D], needed where there are no keys yet.
        """
        if self.first:
            self.rows.let_go()
        stop = self.filled + count
        like = self.k if like is None else like
        assert like is not None
        table = self.rows.table
        wide = self.k is not None and table is not None and table.shape[0] > self.k.shape[0]
        if self.k is None or stop > self.k.shape[1] or wide or _frozen(self.k):
            self._grow(like, stop)
        assert self.k is not None
        self.filled = stop
        if self.first:
            self.rows.grown(like.shape[0], stop, self.k.shape[1], like.device)

    def write(self, start: int | Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [rows, L, Hkv, D] from position start on, or [rows, Hkv, D] of one -> all filled.

        start: int64 [1] where the same call is to write to other positions later: then all that
        there is room for is given back.
        """
        assert self.k is not None
        assert self.v is not None
        rows = k.shape[0]  # fewer than there were, where some have left
        if isinstance(start, Tensor):
            self.k[:rows].index_copy_(1, start, k.unsqueeze(1))
            self.v[:rows].index_copy_(1, start, v.unsqueeze(1))
            return self.k, self.v
        at = start if k.dim() == 3 else slice(start, self.filled)
        self.k[:rows, at] = k
        self.v[:rows, at] = v
        return self.k[:, : self.filled], self.v[:, : self.filled]

    def _grow(self, k: Tensor, stop: int) -> None:
        now = 0 if self.k is None else self.k.shape[1]
        needed = self.rows.needed
        if stop <= now:
            capacity = now
        elif needed is not None and needed >= stop:
            capacity = min(needed, max(stop + MOST_ROOM, 2 * now))
        else:
            capacity = max(stop, 2 * now) if now else stop + ROOM
        rows, table = k.shape[0], self.rows.table
        if table is not None and table.shape[0] > rows:  # some have come
            rows = max(table.shape[0], 2 * rows)
        room = (rows, capacity, *k.shape[2:])
        for name in ("k", "v"):
            old, new = getattr(self, name), k.new_empty(room)
            if old is not None:
                new[: old.shape[0], : self.filled] = old[:, : self.filled]
            setattr(self, name, new)
        self.dtype, self.device, self.is_initialized = k.dtype, k.device, True

    def _ordered(self, x: Tensor | None, table: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x[:, : self.filled]
        if table is not None:
            rows = table[:, : self.filled].clamp_min(0).long()
            x = x[rows, torch.arange(self.filled, device=x.device)]
        return x.transpose(1, 2)

    def in_order(self, name: str) -> Tensor | None:
        """Keys or values in the order of the rows now, [rows, Hkv, length, D]."""
        return self._ordered(self.__dict__.get(name[0]), self.rows.ancestry)

    def _given(self, name: str) -> Tensor | None:
        """The same, for somebody who may write into them."""
        handed = self.rows.handed
        copy = handed.copy_of(self, name)
        if copy is not None:
            return copy
        found = self.in_order(name)
        if found is None or not self.rows.moved:
            return found
        return handed.copied(self, name, found)

    def take_back(self, name: str, copy: Tensor) -> None:
        """NotImplementedError: rows that have changed places share keys."""
        now = self.in_order(name)
        # there may be a position more than when it was given: a forward goes layer by layer
        if now is None or not same(now[:, :, : copy.shape[2]], copy):
            raise NotImplementedError(
                f"fastvlm: {name} of a cache whose beams have changed places were written into; "
                "decode with fastvlm.unpatch(model)"
            )

    def renew(self) -> None:
        """A view is what steps read."""

    @property
    def keys(self) -> Tensor | None:
        return self._given("keys")

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._set("k", value)

    @property
    def values(self) -> Tensor | None:
        return self._given("values")

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._set("v", value)

    def _set(self, name: str, value: Tensor | None) -> None:
        if value is None:
            self.__dict__[name] = None
            return
        if self.rows.moved:
            raise NotImplementedError(
                "fastvlm: keys and values of a cache whose beams have changed places cannot be "
                "assigned; decode with fastvlm.unpatch(model)"
            )
        self.__dict__[name] = value.transpose(1, 2).contiguous()
        self.filled = value.shape[-2]
        if self.first:
            self.rows.grown(value.shape[0], self.filled, self.filled, value.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What transformers' own attention calls."""
        self.append(key_states.transpose(1, 2), value_states.transpose(1, 2))
        return self.in_order("keys"), self.in_order("values")

    def get_seq_length(self) -> int:
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def reset(self) -> None:
        self.k = self.v = None
        self.filled, self.is_initialized = 0, False
        self.rows.forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.first:
            self.rows.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        if self.first:
            self.rows.let_go()
        if tokens_to_remove > 0:  # once the length to keep; transformers' layers refuse it too
            raise ValueError(
                "fastvlm: tokens_to_remove must be 0 or less, the number of tokens to remove as a "
                f"negative; got {tokens_to_remove}"
            )
        self.filled = max(0, self.filled - abs(tokens_to_remove))
        rows = self.rows
        if self.first and rows.table is not None:
            rows.grown(rows.table.shape[0], self.filled, 0, rows.table.device)
            # what is written there again is each row's own
            rows.table[:, self.filled :] = _own(rows.table.shape[0], 1, rows.table.device)

    def drop(self, count: int) -> None:
        """The first count positions are given up, and no copy of them is kept."""
        if self.first:
            self.rows.let_go()
        for x in (self.k, self.v):
            if x is not None:
                x[:, : self.filled - count] = x[:, count : self.filled].clone()
        self.filled -= count

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._changed(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._changed(lambda x: x[indices])

    def _changed(self, change: Any) -> None:
        """Other rows than there were: the table starts anew."""
        if self.first:
            self.rows.restart()
        if self.k is None or self.v is None:
            return
        self.k, self.v = (
            change(self._ordered(x, self.rows.before)).transpose(1, 2).contiguous()
            for x in (self.k, self.v)
        )
        if self.first:
            self.rows.grown(self.k.shape[0], self.filled, self.k.shape[1], self.k.device)


def keep_rows(cache: Cache) -> None:
    """Turn a still empty self-attention cache into one whose rows stay in place."""
    count = len(cache.layers)
    rows = Rows(cache.__dict__.get("fastvlm_needed"))
    hf.set_layer_maker(cache, partial(RowLayer, rows))
    for index in range(count):
        layer_of(cache, index)


def make_room(cache: Cache, positions: int) -> None:
    """Say how many positions a cache may come to, be it one of ours already or turned into one."""
    if keeps_rows(cache):
        rows_of(cache).needed = positions
    else:
        cache.__dict__["fastvlm_needed"] = positions


def keeps_rows(cache: Any) -> bool:
    made = hf.layer_maker(cache)
    return isinstance(made, partial) and made.func is RowLayer


def rows_of(cache: Any) -> Rows:
    """What the layers of such a cache share."""
    found: Rows = hf.layer_maker(cache).args[0]
    return found


def layer_of(cache: Any, index: int) -> RowLayer:
    while len(cache.layers) <= index:
        cache.layers.append(hf.layer_maker(cache)())
    found: RowLayer = cache.layers[index]
    return found
