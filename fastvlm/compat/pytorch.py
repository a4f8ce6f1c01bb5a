"""Names of PyTorch that it does not promise. All: torch 2.10 to 2.14."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every
from torch.utils import _python_dispatch
from torch.utils.module_tracker import ModuleTracker
from torch.utils.weak import WeakTensorKeyDictionary

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work around this call."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def is_watched() -> bool:
    """Whether a dispatch mode (a counter, a tracer) sees every op that is called."""
    return bool(torch._C._len_torch_dispatch_stack() > 0)


def unwatched() -> AbstractContextManager[Any]:
    """Inside, ops are called past all dispatch modes: what a finalizer does is nobody's trace."""
    manager: AbstractContextManager[Any] = _python_dispatch._disable_current_modes()
    return manager


def refusing(message: str, grads: Sequence[Any]) -> tuple[Any, ...]:
    """The tensors among grads as they are, but that a gradient of theirs is this error."""
    error = torch._C._functions.DelayedError(message.encode(), len(grads))
    found = error(*(g.detach().requires_grad_() if isinstance(g, Tensor) else g for g in grads))
    return found if isinstance(found, tuple) else (found,)


def version_of(x: Tensor) -> int | None:
    """How often x was written to in place; None for a tensor that is not counted."""
    return None if x.is_inference() else x._version


def same_storage(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors lie in one storage, whatever their views."""
    return bool(x.untyped_storage()._cdata == y.untyped_storage()._cdata)


def has_hooks(module: nn.Module, backward: bool = True) -> bool:
    """Whether calling a module runs hooks of its own; backward: those of its backward pass too."""
    return any(getattr(module, name) for name in (_HOOKS if backward else _HOOKS[:2]))


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """All hooks of a module, forward and backward."""
    own = vars(module)
    return tuple(hook for name in _HOOKS if own[name] for hook in own[name].values())


def forward_hooks(module: nn.Module) -> list[Any]:
    """The hooks before and after a module's forward."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def has_hooks_of_all() -> bool:
    """Whether there are hooks of all modules, but for those with which a counter of FLOPs notes the
    names of what is called (`torch.utils.module_tracker`)."""
    if not every._has_any_global_hook():
        return False
    hooks = [hook for kind in _HOOKS for hook in getattr(every, f"_global{kind}").values()]
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def after_grad_hooks(parameter: Tensor) -> dict[Any, Any] | None:
    """The hooks that are told when a parameter's gradient is there, by their ids; None without any.

    autograd goes through this dict itself: who empties it silences them.
    """
    hooks: dict[Any, Any] | None = parameter._post_accumulate_grad_hooks
    return hooks


def drops(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's dropouts, whose rate is called p."""
    return isinstance(module, nn.modules.dropout._DropoutNd)


def has_onednn_linear() -> bool:
    """Whether this build calls oneDNN's product directly."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, k] times weight [n, k] plus bias [n], by oneDNN -> [T, n]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread (2.10 to 2.14)."""
    return bool(torch._C._current_graph_task_id() != -1)


def notes_on_tensors() -> MutableMapping[Tensor, Any]:
    """A dict by tensors, told apart as objects, that forgets those nobody holds any more."""
    notes: MutableMapping[Tensor, Any] = WeakTensorKeyDictionary()
    return notes
