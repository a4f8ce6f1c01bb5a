"""The forwards of a decoding loop: through the model, then by the stack's program alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from fastvlm.compat import hf
from fastvlm.decoding import cache as cross_cache
from fastvlm.generate.feed import Arrival, CannotJoin
from fastvlm.generate.head import Head, Last
from fastvlm.generate.lean import Lean
from fastvlm.run.embedding import rotation_of
from fastvlm.run.step import STEPS


class Read(NamedTuple):
    """A forward's outputs, as a loop reads them."""

    outputs: Any
    last: Last


Forward = Callable[..., Read]  # of the keyword arguments of the model
Prefill = Callable[[Tensor, dict[str, Any]], Read]  # of the tokens, and what generate() prepared


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
        prefill: Prefill,
        call: Forward,
        kwargs: dict[str, Any],
        device: torch.device,
        stack: Any = None,
        leaves: bool = False,
    ) -> None:
        self.model, self.kwargs, self.device = model, kwargs, device
        self._given = dict(kwargs)
        self._prefill, self._call, self._stack = prefill, call, stack
        self._leaves = leaves
        self._head: Head | None = None
        self._lean: Lean | None = None
        self._readers = Counter({0: 1})  # by the place of what they read

    @property
    def may_leave(self) -> bool:
        """Whether `move` may be given fewer rows than there are."""
        return self._leaves and self._lean is not None and not self._lean.is_captured

    def begin(self, ids: Tensor) -> Last:
        """ids int64 [R, L]."""
        read = self._prefill(ids, self.kwargs)
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

    def move(self, order: Sequence[int], sources: Sequence[int] = ()) -> None:
        """The rows from which those of the next step go on, -1 for one that begins; sources: the
        place of what each reads, where images come and go."""
        cache = hf.cache_in(self.kwargs)
        if self._lean is not None:
            self._lean.move(order, sources)
        elif cache is not None:
            index = torch.tensor(order, device=self.device)  # the model may be offloaded
            if hasattr(self.model, "_reorder_cache"):
                self.kwargs[hf.cache_argument()] = self.model._reorder_cache(cache, index)
            elif hasattr(cache, "reorder_cache"):
                cache.reorder_cache(index)
            else:
                kind = type(self.model).__name__
                raise ValueError(f"fastvlm: beams of {kind} cannot be reordered in its cache")

    def open(self) -> None:
        """From here on images come and go, after two forwards. CannotJoin: that cannot be."""
        if self._lean is None:
            raise CannotJoin("its forward does more than its decoder and its head")
        self._lean.open()

    def join(self, arrival: Arrival) -> list[int]:
        """The places of the encoder's rows of an arrival, which go through the model once, so that
        whatever it makes of them is made of these too."""
        assert self._lean is not None
        self._lean.trim()
        cache = self._lean.stack.new_cache()
        given = {
            **self._given, **hf.cached(cache), "attention_mask": arrival.mask,
            "encoder_outputs": BaseModelOutput(arrival.states),
        }  # fmt: skip
        first = {one.row: one.begun[0] for one in arrival.asked}
        begun = [[first.get(row, 0)] for row in range(arrival.states.shape[0])]
        self._prefill(torch.tensor(begun, device=self.device), given)
        if not cross_cache.is_shared(cache.cross_attention_cache):
            raise CannotJoin("its cross-attention keeps no keys to share")
        return self._lean.put(cache)

    def enter(self, source: int) -> None:
        """One more search reads what lies in this place."""
        self._readers[source] += 1

    def leave(self, source: int) -> None:
        """One fewer does; after the last the place is free."""
        self._readers[source] -= 1
        if not self._readers[source] and self._lean is not None:
            self._lean.free(source)

    @property
    def cache(self) -> Any:
        return hf.cache_in(self.kwargs)

    def _update(self, read: Read) -> None:
        self.kwargs = self.model._update_model_kwargs_for_generation(
            read.outputs, self.kwargs, is_encoder_decoder=self.model.config.is_encoder_decoder
        )

    def _taken_over(self, last: Last, arguments: dict[str, Any]) -> Lean | None:
        """The program of the stack, if the forward through the model was that and the head."""
        cache, stack = self.cache, self._stack
        step = (STEPS.get(cache) or {}).get(id(stack)) if cache is not None else None
        ran = None if step is None else step.last
        if step is None or ran is None or last.head is None or not last.head.same(self._head):
            return None
        states = ran.out
        if last.states is None or states.shape != last.states.shape:
            return None
        factor = _factor(self.model, states, last.states)
        if factor is None:
            return None
        prefix = "decoder_" if self.model.config.is_encoder_decoder else ""
        positions = arguments.get(prefix + "position_ids")
        if stack.spec.embedding.given and positions is not None:
            return None  # how its positions are counted is the model's business
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
        return Lean(stack, step, last.head, cache, ran.layouts, positions, factor)


def _factor(model: Any, states: Tensor, read: Tensor) -> float | None:
    """What a model multiplies the states of its decoder with before its head reads them: 1, or as
    T5 with a tied head; None where it does something else."""
    if states.data_ptr() == read.data_ptr():
        return 1.0
    width = getattr(model, "model_dim", None)
    if not isinstance(width, int) or not torch.equal(states * width**-0.5, read):
        return None
    return float(width**-0.5)
