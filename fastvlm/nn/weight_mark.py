"""Whether a weight still holds the values it had: for what was, or is to be, computed from them.

PyTorch counts writes into a tensor (``_version``), but not those through ``.data``, nor those of
fused optimizers. So three things are looked at: that count, whether an optimizer that holds the
weight has stepped since, and the bits of some of its elements.

What escapes: a write through ``.data`` (or from outside of PyTorch) that is no step of a
`torch.optim.Optimizer` and touches none of these elements, a single row of an embedding, say.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fastvlm.compat import pytorch

_SAMPLES = 64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Steps:
    """How often optimizers have stepped in this process, and which did so last when."""

    def __init__(self) -> None:
        self.count = 0
        self._counter = itertools.count(1)
        self._last: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._listens = False

    def listen(self) -> None:
        """From now on. All other marks ask for it: who never uses one pays nothing."""
        if not self._listens:
            self._listens = True
            register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: Optimizer, *arguments: Any) -> None:
        self.count = self._last[optimizer] = next(self._counter)

    def has_moved(self, weight: Tensor, since: int) -> bool:
        """Whether an optimizer that holds the weight has stepped since that count."""
        if not weight.requires_grad:
            return False
        stepped = [o for o, last in list(self._last.items()) if last > since]
        groups = (group for optimizer in stepped for group in optimizer.param_groups)
        return any(weight is parameter for group in groups for parameter in group["params"])


_steps = _Steps()


class WeightMark:
    """What shows whether a weight has changed since this was made. Makes no copy but of a few
    elements, and waits for no device; `is_current` does."""

    def __init__(self, weight: Tensor) -> None:
        _steps.listen()
        self._since = _steps.count
        self._version = pytorch.version_of(weight)
        self._values: Tensor | None = None
        if not weight.is_meta:
            with torch.inference_mode(False), torch.no_grad():
                # a view: while it is held, no other tensor can come to lie at the weight's address
                self._sample = _sample(weight)
                self._values = self._sample.clone()

    def is_current(self, weight: Tensor) -> bool:
        """Whether the weight that this was made of, the same tensor, holds the same values."""
        if self._version is not None and pytorch.version_of(weight) != self._version:
            return False
        if _steps.count != self._since:
            now = _steps.count
            if _steps.has_moved(weight, self._since):
                return False
            self._since = now
        if self._values is None:
            return True
        if weight.untyped_storage().nbytes() < weight.numel() * weight.element_size():
            return False  # sharded meanwhile: its memory is gone
        with torch.no_grad():
            return torch.equal(_sample(weight), self._values)


class WrittenTo:
    """Whether any of some weights was written into: the quick part of a `WeightMark`, for what is
    asked at every step and made anew now and then. Writes through ``.data`` escape it."""

    def __init__(self, weights: list[Tensor]) -> None:
        _steps.listen()
        self._since, self._weights = _steps.count, weights
        self._versions = [pytorch.version_of(weight) for weight in weights]

    def __bool__(self) -> bool:
        if any(pytorch.version_of(w) != v for w, v in zip(self._weights, self._versions)):
            return True
        if _steps.count == self._since:
            return False
        now = _steps.count
        if any(_steps.has_moved(weight, self._since) for weight in self._weights):
            return True
        self._since = now
        return False


def _sample(weight: Tensor) -> Tensor:
    """The bits of a few elements in different rows and columns, a view: NaN is NaN again."""
    weight = weight.detach()
    line = weight.view(-1) if weight.is_contiguous() else weight.diagonal()
    return line[:: max(1, line.numel() // _SAMPLES) | 1].view(_BITS[weight.element_size()])
