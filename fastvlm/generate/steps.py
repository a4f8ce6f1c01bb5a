"""The forwards of a decoding loop: through the model, then by the stack's program alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvlm.compat import hf
from fastvlm.decoding import rows as kept
from fastvlm.decoding.prefixes import starts_of
from fastvlm.generate.head import Head, Last
from fastvlm.layout import Layout
from fastvlm.run import graphs
from fastvlm.run.build import build_step
from fastvlm.run.embedding import embed_step, rotation_of
from fastvlm.run.layouts import Layouts
from fastvlm.run.step import STEPS, DecodeStep


class Read(NamedTuple):
    """A forward's outputs, as a loop reads them."""

    outputs: Any
    last: Last


Forward = Callable[..., Read]  # of the keyword arguments of the model, or of its prefill


class Steps:
    """The forwards of one loop.

    call: the model's, with its keyword arguments; prefill: the first one. Both give a `Read`.
    device: of the tokens. stack: the decoder whose program may take over once two forwards through
    the model did nothing beside it and the head; None where it may not. leaves: whether rows may
    leave the batch.
    """

    def __init__(
        self,
        model: Any,
        prefill: Callable[[], Read],
        call: Forward,
        kwargs: dict[str, Any],
        device: torch.device,
        stack: Any = None,
        leaves: bool = False,
    ) -> None:
        self.model, self.kwargs, self.device = model, kwargs, device
        self._prefill, self._call, self._stack = prefill, call, stack
        self._leaves = leaves
        self._head: Head | None = None
        self._lean: _Lean | None = None

    @property
    def may_leave(self) -> bool:
        """Whether `move` may be given fewer rows than there are."""
        return self._leaves and self._lean is not None and not self._lean.is_captured

    def begin(self) -> Last:
        read = self._prefill()
        self._update(read)
        self._head = read.last.head
        return read.last

    def next(self, rows: list[list[int]], tokens: Tensor) -> Last:
        """rows: the tokens of each; tokens int64 [R]: their last, on the device of the loop."""
        if self._lean is not None:
            return Last(self._lean(tokens), self._lean.head)
        length = 1 if self.kwargs["use_cache"] else None
        ids = torch.tensor(rows, device=tokens.device)
        arguments = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=length, **self.kwargs
        )
        read = self._call(**arguments)
        self._update(read)
        if self._stack is not None:
            self._lean = self._taken_over(read.last, arguments)
            self._stack = None if self._lean is None else self._stack
        return read.last

    def move(self, order: Sequence[int]) -> None:
        """The rows from which those of the next step go on."""
        cache = hf.cache_in(self.kwargs)
        if self._lean is not None:
            self._lean.move(order)
        elif cache is not None:
            index = torch.tensor(order, device=self.device)  # the model may be offloaded
            if hasattr(self.model, "_reorder_cache"):
                self.kwargs[hf.cache_argument()] = self.model._reorder_cache(cache, index)
            elif hasattr(cache, "reorder_cache"):
                cache.reorder_cache(index)
            else:
                kind = type(self.model).__name__
                raise ValueError(f"fastvlm: beams of {kind} cannot be reordered in its cache")

    @property
    def cache(self) -> Any:
        return hf.cache_in(self.kwargs)

    def _update(self, read: Read) -> None:
        self.kwargs = self.model._update_model_kwargs_for_generation(
            read.outputs, self.kwargs, is_encoder_decoder=self.model.config.is_encoder_decoder
        )

    def _taken_over(self, last: Last, arguments: dict[str, Any]) -> _Lean | None:
        """The program of the stack, if the forward through the model was that and the head."""
        cache, stack = self.cache, self._stack
        step = (STEPS.get(cache) or {}).get(id(stack)) if cache is not None else None
        ran = None if step is None else step.last
        if step is None or ran is None or last.head is None or not last.head.same(self._head):
            return None
        if stack.spec.embedding.given:
            return None  # how its positions are counted is the model's business
        states = ran.out()
        if states is None or last.states is None or states.shape != last.states.shape:
            return None
        if states.data_ptr() != last.states.data_ptr():
            return None
        prefix = "decoder_" if self.model.config.is_encoder_decoder else ""
        positions = arguments.get(prefix + "position_ids")
        if stack.spec.rotary is not None:
            if positions is not None and positions.dim() != 2:
                return None
            filled = step.layers[0].filled - 1
            again = rotation_of(stack, states, positions, filled)
            if not all(map(torch.equal, again, ran.rotation)):
                positions = None if positions is None else positions + 1  # as PaliGemma counts
                again = rotation_of(stack, states, positions, filled)
                if not all(map(torch.equal, again, ran.rotation)):
                    return None
        return _Lean(stack, step, last.head, cache, ran.layouts, positions)


class _Lean:
    """The steps of a stack by its program, the model around it left out.

    layouts: of the step before. positions: int64 [1 or R, 1], of its tokens, for a rotary stack.
    """

    def __init__(
        self, stack: Any, step: DecodeStep, head: Head, cache: Any, layouts: Any, positions: Any
    ) -> None:
        self.stack, self.step, self.head, self.cache = stack, step, head, cache
        self._cross, self._seen, self._positions = layouts.cross, layouts.visible, positions
        self._kept = kept.rows_of(getattr(cache, "self_attention_cache", cache))
        assert self._kept.lengths is not None
        self._device, rows = self._kept.lengths.device, self._kept.lengths.shape[0]
        self._images = None if self._cross is None else list(self._cross.images)
        table = stack.spec.embedding.positions
        self._starts = None if table is None else starts_of(getattr(stack, table), rows)
        self._in_order = list(range(rows))
        self._class = type(stack)

    @property
    def is_captured(self) -> bool:
        """Whether a graph runs the steps, which is of one number of rows."""
        return graphs.recorder(self.step.layers[0].k) is not None

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens int64 [R] -> the last states, [R, d]."""
        if type(self.stack) is not self._class:
            raise RuntimeError(
                "fastvlm: another thread called fastvlm.patch or unpatch(model) while its "
                "generate() ran; unpatch when generate() has returned"
            )
        if self.step.is_stale:  # weights in fewer bits, whose originals were written into
            self.step = build_step(self.stack, self.cache) or self.step
        filled = self.step.layers[0].filled
        if self._seen is not None:  # the new tokens, each in its own row of the cache
            rows = self._seen.shape[0]
            own = torch.arange(rows, dtype=self._seen.dtype, device=self._seen.device)
            self._seen = torch.cat((self._seen, own.unsqueeze(1)), 1)
        if self._positions is not None:
            self._positions = self._positions + 1
        x = embed_step(self.stack, tokens.unsqueeze(1), filled, None, self._starts)
        rotation = rotation_of(self.stack, x, self._positions, filled)
        layouts = Layouts(cross=self._cross, visible=self._seen, marks=None)
        return self.step(x, layouts, rotation)

    def move(self, order: Sequence[int]) -> None:
        rows = len(self._in_order)
        if list(order) == self._in_order:
            return
        index = torch.tensor(order, device=self._device)
        self._kept.reorder(index)
        if self._seen is not None:
            self._seen = self._seen.index_select(0, index)
        if self._positions is not None and self._positions.shape[0] == rows:
            self._positions = self._positions.index_select(0, index)
        if self._starts is not None:
            self._starts = self._starts.index_select(0, index)
        if self._images is not None:
            images = [self._images[row] for row in order]
            if images != self._images:
                self._cross = Layout.from_lengths(
                    [1] * len(order), self._cross.kv_lengths, images, device=self._cross.device
                )
                self._images = images
        self._in_order = list(range(len(order)))
