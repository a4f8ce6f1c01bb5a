"""How one module is changed: it keeps all it has and gets a subclass of its own class."""

from __future__ import annotations

import functools
import inspect
from functools import cache
from types import MethodType
from typing import Any

from torch import nn

from fastvlm.nn.linear import original
from fastvlm.patching.foreign import bound_forward
from fastvlm.patching.interposed import forget, without_look
from fastvlm.patching.rules import Alias, Swap
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
            "_slow_forward": _refuse_tracing,
            "qconfig": property(_no_qconfig, _refuse_quantizing),
            "_fastvlm_base": base,
            "_fastvlm_swap": swap,
            **{n: v.descriptor() if isinstance(v, Alias) else v for n, v in swap.attributes},
        },
    )
    cls._fastvlm_class = cls  # what a subclass inherits, and is not
    if getattr(swap.mixin, "keeps_signature", False):
        cls.forward = _as_signed(base.forward, swap.mixin.forward)
    return cls


def _refuse_tracing(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What PyTorch calls while torch.jit.trace runs; it would keep the example's mask for all."""
    raise RuntimeError(
        "fastvlm: a patched model cannot be traced (torch.jit.trace, torch.onnx.export with "
        "dynamo=False): which rows are padding would be taken from the example; call "
        "fastvlm.unpatch(model) first"
    )


def _no_qconfig(module: nn.Module) -> Any:
    raise AttributeError("qconfig")


def _refuse_quantizing(module: nn.Module, value: Any) -> None:
    """torch.ao.quantization marks the modules it may replace, and knows them by their class."""
    raise RuntimeError(
        "fastvlm: torch.ao.quantization does not find the layers of a patched model; call "
        'fastvlm.unpatch(model) first, or let fastvlm.patch(model, weights="int8") store them'
    )


def _as_signed(signed: Any, forward: Any) -> Any:
    """forward under the signature of another, by which trainers choose a data set's columns.

    Somebody may have kept it, bound to a module that is unpatched by now: torch.compile(m.forward).
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(type(self), "_fastvlm_base"):
            return forward(self, *args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

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
    state = without_look(module.__dict__)
    return _rebuild, (cls._fastvlm_base, cls._fastvlm_swap), state  # type: ignore[attr-defined]


def is_patched(module: nn.Module) -> bool:
    return original(type(module)) is not type(module)


def unpatched_class(module: Any) -> Any:
    return original(type(module))


def holds_our_forward(module: nn.Module) -> bool:
    """Whether what stands on a patched instance in place of its forward may hold ours, which would
    not do for the module once it is patched no more."""
    cls = type(module)
    ours = cls.forward is not original(cls).forward
    return ours and not getattr(cls, "keeps_signature", False)


def become(module: nn.Module, cls: Any) -> None:
    forget_copy(module)
    forget(module)
    before = type(module).forward
    left = getattr(type(module), "_fastvlm_swap", None)
    for name in getattr(getattr(left, "mixin", None), "instance_attributes", ()):
        vars(module).pop(name, None)
    module.__class__ = cls
    for name in ("forward", "_old_forward"):  # Accelerate's, around the class's
        if bound_forward(module, name) is before:
            vars(module)[name] = MethodType(cls.forward, module)
