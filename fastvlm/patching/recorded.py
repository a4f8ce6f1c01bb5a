"""What a model's forward does between its head and its logits, written down as it happens.

In a decoding loop of ours the head of a model gives `RecordedLogits` to the model's own forward. If
that does what is known (a bias, a softcap, a cast), the loop reads the states and the head
(`RecordedLogits.last`), and later steps leave the forward out. Whatever else is done with them
computes the logits first, and goes on with those.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastvlm.generate.head import Head, Last
from fastvlm.patching.lazy_tensor import materialize
from fastvlm.patching.logits import LazyLogits

# in this thread a head computes what was recorded of it: then it gives numbers
_COMPUTES: ContextVar[bool] = ContextVar("fastvlm_computes_recorded", default=False)


def computes_recorded() -> bool:
    return _COMPUTES.get()


def _unless_computed(name: str) -> Callable[..., Any]:
    lazily = getattr(LazyLogits, name)

    def call(self: RecordedLogits, *args: Any, **kwargs: Any) -> Any:
        if self.computed:
            return getattr(self.computed[0], name)(*args, **kwargs)
        return lazily(self, *args, **kwargs)

    return call


@dataclass(frozen=True, eq=False)
class RecordedLogits(LazyLogits):
    """The logits of a forward that a decoding loop called. head: the module that gave them. added:
    what the model added to its output, as it was.

    Once computed they are what was computed: a model that writes into its logits finds that again.
    """

    head: Any = None
    added: Tensor | None = None
    computed: list[Tensor] = field(default_factory=list, init=False)

    def last(self) -> Last:
        """The states of the last position and the head, or the logits where there are some."""
        if self.computed or self.divided is not None or self.ndim != 3:
            return Last(logits=self.tensor()[:, -1])
        return Last(self.h[:, -1], Head(self.head, self.added, self.softcap, self.dtype))

    def _computed(self) -> Tensor:
        if self.divided is None:
            return Head(self.head, self.added, self.softcap, self.dtype).logits(self.h)
        logits: Tensor = self.head(self.h)  # a softcap of which a part has been asked for
        logits = (logits if self.added is None else logits + self.added) / self.divided
        return (torch.tanh(logits) if self.bounded else logits).to(self.dtype)

    def tensor(self) -> Tensor:
        if not self.computed:
            token = _COMPUTES.set(True)
            try:
                self.computed.append(super().tensor())
            finally:
                _COMPUTES.reset(token)
        return self.computed[0]

    float = _unless_computed("float")
    contiguous = _unless_computed("contiguous")
    to = _unless_computed("to")
    view = _unless_computed("view")
    reshape = _unless_computed("reshape")
    tanh = _unless_computed("tanh")
    __truediv__ = _unless_computed("__truediv__")
    __mul__ = _unless_computed("__mul__")
    __getitem__ = _unless_computed("__getitem__")

    def __add__(self, other: Any) -> Any:
        if self.computed:
            return self.computed[0] + other
        found = super().__add__(other)
        return replace(found, added=other) if isinstance(found, RecordedLogits) else found

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tensor()[index] = value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(isinstance(arg, cls) and arg.computed for arg in args):
            args = [materialize(arg) for arg in args]
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)
