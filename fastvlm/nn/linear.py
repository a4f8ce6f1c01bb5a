"""The linear projection as a module, and the question whether a module may be bypassed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as every
from torch.utils.module_tracker import ModuleTracker

from fastvlm import ops

DENSE = (Tensor, nn.Parameter)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Linear(nn.Linear):
    """`torch.nn.Linear` over `fastvlm.ops.linear`: same parameters, same results.

    A few rows (a decoding step) stream the weight once; more, with gradients too, go through the
    library whose product is the fastest here.
    """

    storage: str | None = None  # what a subclass keeps its weight in, where not as it is

    def forward(self, input: Tensor) -> Tensor:
        if type(input) not in DENSE or type(self.weight) not in DENSE:
            return super().forward(input)  # a DTensor, or another kind that PyTorch dispatches
        return ops.linear(input, self.weight, self.bias)


def original(cls: type) -> Any:
    """The class that a patched one stands for; cls where it is none, or a subclass of one.

    Not by ``vars(cls)``: torch.compile breaks its graph there once a cache has changed a dict.
    """
    if getattr(cls, "_fastvlm_class", None) is not cls:
        return cls
    return cls._fastvlm_base


def hooks_of_all() -> bool:
    """Whether there are hooks of all modules, but for those with which a counter of FLOPs notes the
    names of what is called (`torch.utils.module_tracker`)."""
    if not every._has_any_global_hook():
        return False
    hooks = [h for kind in _HOOKS for h in getattr(every, f"_global{kind}").values()]
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def is_plain(module: object, *kinds: type[nn.Module]) -> bool:
    """Whether a fused kernel may read module.weight and module.bias instead of calling it.

    kinds: the exact classes that qualify (default: the linear layers). False for an adapter
    (PEFT), a quantized or parametrized layer, a hook (of all modules, too), a forward set on the
    instance, a DTensor, or where the module computes with a copy of its weight in fewer bits: then
    it must be called.
    """
    cls = type(module)
    if getattr(cls, "storage", None) is not None:
        return False
    if original(cls) not in (kinds or (nn.Linear, Linear)):
        return False
    if "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS):
        return False  # an offloader sets a forward of its own on the instance
    if hooks_of_all():
        return False
    return type(module.weight) is nn.Parameter  # type: ignore[attr-defined]
