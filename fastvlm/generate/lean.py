"""The steps of a stack by its program, the model around it left out; rows that come and go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvlm.decoding import cache as cross_cache
from fastvlm.decoding import rows as kept
from fastvlm.decoding.prefixes import starts_of
from fastvlm.generate.feed import CannotJoin
from fastvlm.generate.head import Head
from fastvlm.generate.slots import Slots
from fastvlm.layout import Layout
from fastvlm.models.structure import part_of
from fastvlm.run import graphs
from fastvlm.run.build import build_step
from fastvlm.run.embedding import StepEmbedding, rotation_of
from fastvlm.run.layouts import Layouts
from fastvlm.run.step import DecodeStep

# positions that nobody reads any more, from which on they are given up
_LEAST_DROPPED = 64


class Lean:
    """A loop's steps from the second on.

    layouts: of the step before. positions: int64 [1 or R, 1], of its tokens, for a rotary stack.
    factor: what the head reads of the states.
    """

    def __init__(
        self,
        stack: Any,
        step: DecodeStep,
        head: Head,
        cache: Any,
        layouts: Any,
        positions: Any,
        factor: float,
    ) -> None:
        self.stack, self.step, self.head, self.cache = stack, step, head, cache
        self._factor = factor
        self._cross, self._seen, self._positions = layouts.cross, layouts.visible, positions
        self._kept = kept.rows_of(getattr(cache, "self_attention_cache", cache))
        assert self._kept.lengths is not None
        self._device, rows = self._kept.lengths.device, self._kept.lengths.shape[0]
        self._images = None if self._cross is None else list(self._cross.images)
        table = stack.spec.embedding.positions
        self._starts = None if table is None else starts_of(part_of(stack, table), rows)
        self._in_order = list(range(rows))
        self._class = type(stack)
        self._embed = StepEmbedding(stack)
        self._slots: Slots | None = None
        self._columns: list[int] = []  # with slots: where each row begins

    @property
    def is_captured(self) -> bool:
        """Whether a graph runs the steps, which is of one number of rows."""
        return graphs.recorder(self.step.layers[0].k) is not None

    @property
    def _filled(self) -> int:
        filled: int = self.step.layers[0].filled
        return filled

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens int64 [R] -> the last states, [R, d], as the head reads them."""
        if type(self.stack) is not self._class:
            raise RuntimeError(
                "fastvlm: another thread called fastvlm.patch or unpatch(model) while its "
                "generate() ran; unpatch when generate() has returned"
            )
        if self.step.is_stale:  # weights in fewer bits, whose originals were written into
            self.step = build_step(self.stack, self.cache) or self.step
        filled = self._filled
        if self._seen is not None:  # the new tokens, each in its own row of the cache
            rows = self._seen.shape[0]
            own = torch.arange(rows, dtype=self._seen.dtype, device=self._seen.device)
            self._seen = torch.cat((self._seen, own.unsqueeze(1)), 1)
        if self._positions is not None:
            self._positions = self._positions + 1
        x = self._embed(tokens.unsqueeze(1), filled, None, self._starts)
        rotation = rotation_of(self.stack, x, self._positions, filled)
        layouts = Layouts(cross=self._cross, visible=self._seen, marks=None)
        states = self.step(x, layouts, rotation)
        return states if self._factor == 1 else states * self._factor

    def move(self, order: Sequence[int], sources: Sequence[int]) -> None:
        """The rows from which those of the next step go on, -1 for one that begins; sources: the
        place of what each reads, where images come and go."""
        rows = len(self._in_order)
        if list(order) == self._in_order:
            return
        index = torch.tensor(order, dtype=torch.int64, device=self._device)
        begin = any(row < 0 for row in order)
        self._kept.reorder(index, begin)
        self._in_order = list(range(len(order)))
        if self._slots is not None:
            columns = [self._filled if row < 0 else self._columns[row] for row in order]
            self._place(columns, self._slots.images_of(sources))
            return
        if self._seen is not None:
            self._seen = self._seen.index_select(0, index)
        if self._positions is not None and self._positions.shape[0] == rows:
            self._positions = self._positions.index_select(0, index)
        if self._starts is not None:
            self._starts = self._starts.index_select(0, index)
        if self._images is not None:
            images = [self._images[row] for row in order]
            if images != self._images:
                self._read(self._cross.kv_lengths, images)

    def _read(self, lengths: Sequence[int], images: list[int]) -> None:
        ones = [1] * len(images)
        self._cross = Layout.from_lengths(ones, lengths, images, device=self._cross.device)
        self._images = images

    def open(self) -> None:
        """From here on images come and go. CannotJoin: what the steps read is of one batch."""
        cross = getattr(self.cache, "cross_attention_cache", None)
        if cross is None or self._cross is None or not cross_cache.is_shared(cross):
            raise CannotJoin("its decoder reads no encoder")
        if self.is_captured or self._seen is not None:
            raise CannotJoin(
                "its steps are captured" if self.is_captured else "its rows are padded"
            )
        if self.stack.spec.embedding.counts_tokens:
            raise CannotJoin("its positions are counted by a module, from column 0")
        filled = self._filled
        if self._positions is not None and bool((self._positions != filled - 1).any()):
            raise CannotJoin("its positions are not counted from 0")
        self._slots = Slots(cross.layers)
        self._place([0] * len(self._in_order), self._slots.images_of([0] * len(self._in_order)))

    def _place(self, columns: list[int], images: list[int]) -> None:
        """Where the rows begin, and what they read."""
        assert self._slots is not None
        if columns != self._columns:
            self._columns = columns
            starts = torch.tensor(columns, dtype=torch.int64, device=self._device)
            if self.stack.spec.embedding.positions is not None:
                self._starts = starts
            if self.stack.spec.rotary is not None:
                self._positions = (self._filled - 1 - starts).unsqueeze(1)
        lengths = self._slots.kv_lengths
        if images != self._images or self._cross.kv_lengths != lengths:
            self._read(lengths, images)

    def put(self, cache: Any) -> list[int]:
        """Places for what another cache, prefilled by the same model, holds of its images."""
        assert self._slots is not None
        if self._slots.put(cache.cross_attention_cache.layers):  # other tensors than the step has
            step = build_step(self.stack, self.cache)
            if step is None:
                raise CannotJoin("a module of its decoder must be called")
            self.step = step
        return self._slots.latest

    def free(self, place: int) -> None:
        assert self._slots is not None
        self._slots.free(place)

    def trim(self) -> None:
        """Give up the positions before the first that a row reads, once they are many."""
        unread = min(self._columns, default=self._filled)
        if unread < max(_LEAST_DROPPED, self._filled - unread):
            return
        for layer in self.step.layers:
            layer.drop(unread)
        self._kept.drop(unread)
        self._place([column - unread for column in self._columns], list(self._images or ()))
