"""How one module is changed: it keeps all it has and gets a subclass of its own class."""

from __future__ import annotations

import functools
import inspect
from functools import cache
from typing import Any

from torch import nn

from fastvlm.nn.linear import original
from fastvlm.patching.rules import Swap
from fastvlm.patching.weights import forget_copy


class PatchError(ValueError):
    """Nothing could be patched, or with strict=True something was skipped."""


@cache
def swapped(base: Any, swap: Swap) -> Any:
    """The subclass of base with swap's forward; by all names the same class as base."""
    cls = type(base)(
        base.__name__,
        (swap.mixin, base),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce,
            "_fastvlm_base": base,
            "_fastvlm_swap": swap,
            **dict(swap.attributes),
        },
    )
    cls._fastvlm_class = cls  # what a subclass inherits, and is not
    if getattr(swap.mixin, "keeps_signature", False):
        cls.forward = _as_signed(base.forward, swap.mixin.forward)
    return cls


def _as_signed(signed: Any, forward: Any) -> Any:
    """forward under the signature of another, by which trainers choose a data set's columns."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    functools.update_wrapper(call, signed)
    call.__signature__ = inspect.signature(signed)  # type: ignore[attr-defined]
    # whoever unwraps a forward (Accelerate) would leave ours out
    del call.__wrapped__  # type: ignore[attr-defined]
    return call


def _rebuild(base: Any, swap: Swap) -> Any:
    cls = swapped(base, swap)
    return cls.__new__(cls)


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle by base and swap: the subclass itself has no importable name."""
    cls = type(module)
    return _rebuild, (cls._fastvlm_base, cls._fastvlm_swap), module.__dict__  # type: ignore[attr-defined]


def is_patched(module: nn.Module) -> bool:
    return original(type(module)) is not type(module)


def unpatched_class(module: Any) -> Any:
    return original(type(module))


def become(module: nn.Module, cls: Any) -> None:
    forget_copy(module)
    module.__class__ = cls
