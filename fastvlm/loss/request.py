"""What a call with labels tells the modules inside it: which head, which decoder, which rows count.

Heads and embeddings are called by transformers with one tensor, so they find the request of the
call that runs in their thread. It names the modules that it is for: others (a teacher that a hook
calls) are as they are without one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastvlm.compat import pytorch


@dataclass(frozen=True)
class Packed:
    """padded [B, L, d]: rows [tokens, d] at the flat positions index, zeros elsewhere."""

    padded: Tensor
    rows: Tensor
    index: Tensor

    def is_shown_by(self, x: Tensor) -> bool:
        """Whether x is padded or a view of all of it: what slices of nothing make."""
        ours = self.padded
        return (
            x.shape == ours.shape
            and x.stride() == ours.stride()
            and x.storage_offset() == ours.storage_offset()
            and x.dtype == ours.dtype
            and pytorch.same_storage(x, ours)
            and pytorch.version_of(x) == pytorch.version_of(ours)
        )


@dataclass
class LossRequest:
    """One call with labels.

    head, decoder: the modules that it is for. groups: int64 [B], the (task, language) of each row
    of labels. group_losses float32 and group_tokens int64 [num_groups]: filled in by the loss.
    packed: what the decoder gave, by the decoder itself, so that the loss need not look for its
    tokens on the padded grid. table: see `fastvlm.patching.tied`. hidden_labels: a label may count
    in a row that the mask hides; then the decoder must compute that row as transformers does.
    defers: whether the head may give lazy logits.
    """

    head: nn.Module | None = None
    decoder: nn.Module | None = None
    groups: Tensor | None = None
    num_groups: int | None = None
    group_losses: Tensor | None = None
    group_tokens: Tensor | None = None
    packed: Packed | None = None
    table: tuple[Any, ...] | None = None
    hidden_labels: bool = False
    defers: bool = True

    def done(self) -> None:
        """Let go of the graph: whoever keeps the output keeps this."""
        self.packed = self.table = self.head = self.decoder = None

    @contextmanager
    def within(self) -> Iterator[None]:
        """A forward of another model class that this call runs through (VisionEncoderDecoder):
        its decoder knows which rows count, and its head gives logits, which hooks may look at."""
        before, self.defers = self.defers, False
        try:
            yield
        finally:
            self.defers = before


# of the call that runs in this thread
_REQUEST: ContextVar[LossRequest | None] = ContextVar("fastvlm_loss_request", default=None)
# the decoder of the generate() that runs in this thread
_GENERATES: ContextVar[nn.Module | None] = ContextVar("fastvlm_generates", default=None)


def loss_request() -> LossRequest | None:
    return None if torch.compiler.is_compiling() else _REQUEST.get()


@contextmanager
def requesting(request: LossRequest | None) -> Iterator[LossRequest | None]:
    """None: what is called inside is another model's business (a teacher's)."""
    token = _REQUEST.set(request)
    try:
        yield request
    finally:
        _REQUEST.reset(token)


@contextmanager
def generating(decoder: nn.Module | None) -> Iterator[None]:
    """generate() of the model whose decoder this is."""
    token = _GENERATES.set(decoder)
    try:
        yield
    finally:
        _GENERATES.reset(token)


@dataclass
class Readers:
    """A call of a model with this decoder. rows: int64 [B], the encoder row that each row of it
    reads; None where each reads its own. taken: the decoder knows them."""

    decoder: nn.Module | None = None
    rows: Tensor | None = None
    taken: bool = False


_READERS: ContextVar[Readers | None] = ContextVar("fastvlm_readers", default=None)
# of each decoder: what its last such call was of, and these rows
_READ: WeakKeyDictionary[nn.Module, tuple[weakref.ref[Tensor], Tensor]] = WeakKeyDictionary()


@contextmanager
def reading(decoder: nn.Module | None, rows: Tensor | None) -> Iterator[Readers]:
    """Such a call, whoever stands between the model and its decoder (`readers_for`)."""
    found = _READERS.get()
    if rows is not None or found is None or found.decoder is not decoder:
        found = Readers(decoder, rows)
    token = _READERS.set(found)
    try:
        yield found
    finally:
        _READERS.reset(token)


def readers_for(decoder: nn.Module, given: Tensor | None, handed: Tensor | None) -> Tensor | None:
    """The encoder row that each row of a decoder reads: what it was handed, or, from a model that
    hands it no such thing, what that was called with. given: its tokens, or their embeddings."""
    if torch.compiler.is_compiling() or given is None:
        return handed
    found = _READERS.get()
    if found is not None and found.decoder is decoder and found.rows is not None:
        found.taken = True
        _READ[decoder] = weakref.ref(given), found.rows
        return found.rows
    known = None if handed is not None else _READ.get(decoder)
    if known is not None and known[0]() is given and pytorch.in_backward():
        return known[1]  # a checkpoint computes the call again
    return handed


# of each decoder: the mask of its last call with labels, and what was answered
_ANSWERS: WeakKeyDictionary[nn.Module, tuple[weakref.ref[Tensor], bool]] = WeakKeyDictionary()


def knows_its_readers(decoder: nn.Module, mask: Tensor) -> bool:
    """Whether nobody reads what a decoder gives in rows that its mask [B, L] hides.

    A call with labels says which rows count. generate() goes on from the last column. Whoever else
    calls a model may count a label there: a causal model predicts the first token of a text from
    the last pad before it.
    """
    if torch.compiler.is_compiling():
        return False
    request = _REQUEST.get()
    if request is not None and request.decoder is decoder:
        _ANSWERS[decoder] = weakref.ref(mask), not request.hidden_labels
        return not request.hidden_labels
    known = _ANSWERS.get(decoder)
    if known is not None and known[0]() is mask and pytorch.in_backward():
        return known[1]  # a checkpoint computes the call again, when its request is gone
    return _GENERATES.get() is decoder and bool((mask[:, -1] != 0).all())
