"""A stand-in for CUDA graphs on any device: what is captured is done again, to the same tensors.

The ops of a captured function are noted with their arguments, and a replay calls them again with
these. So an op whose numbers should have changed between two steps, or one that reads a tensor that
has been replaced since, gives the wrong answer here as it would on a GPU. What asks a tensor for a
value, or depends on the host, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvlm.run.graphs import Waits

# what waits for the device, or takes its number of elements from values
WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_static", "equal", "unique",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount",
    "repeat_interleave", "lift_fresh", "_assert_async",
}  # fmt: skip


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _Notes(TorchDispatchMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.partition("::")[2] in WAITS:
            raise Waits(f"{func} in a captured step")
        result = func(*args, **kwargs)
        strangers = {x.device for x in _tensors((args, kwargs, result))} - {self.device}
        if strangers:
            raise Waits(f"{func} touches {strangers} in a step on {self.device}")
        self.calls.append((func, args, kwargs, result))
        return result


class Double:
    """A `fastvlm.run.graphs.Recorder`. captured: the ops of each capture. replays: of all."""

    def __init__(self) -> None:
        self.captured: list[list[str]] = []
        self.replays = 0

    def __call__(self, x: Tensor) -> Double:
        """In place of `graphs.recorder`."""
        self.device = x.device
        return self

    def rehearse(self, run: Callable[[], Tensor]) -> Tensor:
        with _Notes(self.device):
            return run()

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with _Notes(self.device) as notes:
            out = run()
        self.captured.append([func._schema.name for func, *_ in notes.calls])
        # capturing computes nothing: what was made is not to be read before a replay
        for _, args, kwargs, result in notes.calls:
            old = {_storage(x) for x in _tensors((args, kwargs))}
            for made in _tensors(result):
                if made.is_floating_point() and _storage(made) not in old:
                    made.fill_(float("nan"))

        def replay() -> Tensor:
            self.replays += 1
            for func, args, kwargs, result in notes.calls:
                again = func(*args, **kwargs)
                for before, now in zip(_tensors(result), _tensors(again), strict=True):
                    if _storage(before) != _storage(now):
                        before.copy_(now)
            return out

        return replay
