"""Whether a weight still holds the values it had: for what was, or is to be, computed from them.

PyTorch counts writes into a tensor (``_version``), but not those through ``.data``, nor those of
fused optimizers. So three things are looked at: that count, whether an optimizer that holds the
weight has stepped since, and the bits of some of its elements.

What escapes: a write through ``.data`` (or from outside of PyTorch) that is no step of a
`torch.optim.Optimizer` and touches none of these elements, a single row of an embedding, say.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fastvlm.compat import pytorch

_SAMPLES = 64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Steps:
    """How often optimizers have stepped in this process, and which weights they held."""

    def __init__(self) -> None:
        self.count = 0
        self._watched: dict[int, weakref.ref[Tensor]] = {}
        self._moved: dict[int, int] = {}
        self._listens = False

    def watch(self, weight: Tensor) -> None:
        """Note from now on when an optimizer moves this weight, as long as it is there."""
        if not self._listens:
            self._listens = True
            register_optimizer_step_post_hook(self._stepped)
        key = id(weight)
        if key not in self._watched:
            self._watched[key] = weakref.ref(weight, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        self._watched.pop(key, None)
        self._moved.pop(key, None)

    def _stepped(self, optimizer: Optimizer, *arguments: Any) -> None:
        self.count += 1
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if id(weight) in self._watched and weight.requires_grad:
                    self._moved[id(weight)] = self.count

    def has_moved(self, weight: Tensor, since: int) -> bool:
        """Whether an optimizer that holds the weight has stepped since that count."""
        return self._moved.get(id(weight), 0) > since


_steps = _Steps()


class WeightMark:
    """What shows whether a weight has changed since this was made. Makes no copy but of a few
    elements, and waits for no device; `is_current` does."""

    def __init__(self, weight: Tensor) -> None:
        _steps.watch(weight)
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
        if _steps.has_moved(weight, self._since):
            return False
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
        for weight in weights:
            _steps.watch(weight)
        self._since, self._weights = _steps.count, weights
        self._versions = [pytorch.version_of(weight) for weight in weights]

    def __bool__(self) -> bool:
        if any(pytorch.version_of(w) != v for w, v in zip(self._weights, self._versions)):
            return True
        return any(_steps.has_moved(weight, self._since) for weight in self._weights)


def _sample(weight: Tensor) -> Tensor:
    """The bits of a few elements in different rows and columns, a view: NaN is NaN again."""
    weight = weight.detach()
    line = weight.view(-1) if weight.is_contiguous() else weight.diagonal()
    return line[:: max(1, line.numel() // _SAMPLES) | 1].view(_BITS[weight.element_size()])
