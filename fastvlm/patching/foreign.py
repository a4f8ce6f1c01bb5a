"""Hooks, forwards and attention functions of others on one module: which of them may matter.

Whoever looks at a module, or computes in its place, is named here; what follows from it for a stack
stands in `fastvlm.patching.interposed`.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastvlm.compat import attentions, pytorch
from fastvlm.nn.linear import is_watched, original

# hooks that neither look at shapes nor change values: (where they are defined, their name or any)
_HARMLESS_HOOKS = (
    ("torch.distributed", None),  # FSDP2, replicate
    ("torch.nn.utils", None),  # weight_norm, spectral_norm, prune: of weights
    ("torch.utils.module_tracker", None),
    ("deepspeed", None),
    ("fastvlm", None),
    ("transformers.utils.output_capturing", "output_capturing_hook"),
    ("transformers", "make_inputs_require_grads"),
    ("peft", "make_inputs_require_grad"),
)
_KNOWN = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "fastvlm")


def is_of(home: str, where: str) -> bool:
    """Whether the path of a module is another, or lies in it."""
    return home == where or home.startswith(where + ".")


def _origin(function: Any) -> tuple[str, str]:
    """Where a hook is defined, and its name."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    if not hasattr(function, "__qualname__"):
        function = type(function)
    return function.__module__ or "", function.__qualname__.rsplit(".", 1)[-1]


def _is_harmless(hook: Any) -> bool:
    home, name = _origin(hook)
    return any(is_of(home, where) and known in (None, name) for where, known in _HARMLESS_HOOKS)


def foreign_hook(module: nn.Module) -> str | None:
    """The name of a hook on a module that may look at what it is given, or None."""
    return next(
        (_origin(hook)[1] for hook in pytorch.hooks_of(module) if not _is_harmless(hook)), None
    )


def _is_accelerates(module: nn.Module, forward: Any) -> bool:
    """Whether a forward is the one with which Accelerate runs its own hooks around a module's."""
    if not isinstance(forward, functools.partial) or "_hf_hook" not in vars(module):
        return False
    hook = module._hf_hook
    hooks = [hook, *getattr(hook, "hooks", ())]
    return all(is_of(type(each).__module__, "accelerate") for each in hooks)


def bound_forward(module: nn.Module, name: str = "forward") -> Any:
    """The function that an instance's attribute binds to the module itself, or None."""
    found = vars(module).get(name)
    if isinstance(found, types.MethodType) and found.__self__ is module:
        return found.__func__
    return None


def own_forward(module: nn.Module) -> str | None:
    """Why a call of module does not run its class's forward; None where it does."""
    forward = vars(module).get("forward")
    if forward is None or is_of(type(module).__module__, "torch._dynamo"):
        return None
    name = "_old_forward" if _is_accelerates(module, forward) else "forward"
    if bound_forward(module, name) is type(module).forward:
        return None
    return f"it has a forward of its own ({_origin(forward)[1]})"


def replaced_forward(cls: Any) -> str | None:
    """Why a class does not compute what its module says: somebody put another forward there."""
    owner = next(each for each in cls.__mro__ if "forward" in vars(each))
    home = getattr(owner.forward, "__module__", None)
    if home in (owner.__module__, None):
        return None
    return f"the forward of {owner.__name__} was replaced by one of {home}"


# whose functions may stand under the names that a forward of transformers uses
_THEIRS = {"transformers", "torch", "kernels", "numpy", "fastvlm", *sys.stdlib_module_names}


def named_functions(cls: Any) -> list[tuple[dict[str, Any], str, Any]]:
    """What a class's forward, as transformers wrote it, calls by a name of its file: the names of
    the file, the name, and what is there now."""
    forward = inspect.unwrap(next(c for c in cls.__mro__ if "forward" in vars(c)).forward)
    names = getattr(forward, "__globals__", {})
    if not is_of(names.get("__name__", ""), "transformers"):
        return []
    used = ((name, names.get(name)) for name in forward.__code__.co_names)
    return [(names, n, f) for n, f in used if callable(f) and not isinstance(f, type)]


def replaced_function(cls: Any) -> str | None:
    """Why a class's forward does not compute what is written in its file: somebody put another
    function under a name that it uses (eager_attention_forward, apply_rotary_pos_emb)."""
    for _, name, found in named_functions(cls):
        # not __module__, which functools.wraps copies
        home = getattr(found, "__globals__", {}).get("__name__") or _origin(found)[0]
        if home.partition(".")[0] not in _THEIRS:
            return f"the {name} of {cls.__name__} was replaced by one of {home}"
    return None


def replaced_in_class(cls: Any) -> str | None:
    """Why a class does not compute what its authors wrote: see the two above."""
    return replaced_forward(cls) or replaced_function(cls)


def replaced_method(module: nn.Module, names: Iterable[str]) -> str | None:
    """The first of these methods that is not transformers' own, or fastvlm's; None without."""
    for name in names:
        found = getattr(module, name, None)
        home = "" if name in vars(module) else _origin(found)[0]
        if found is not None and not (is_of(home, "transformers") or is_of(home, "fastvlm")):
            return name
    return None


def other_forward(module: Any) -> str | None:
    """Why a call of module does not compute what its class says."""
    return own_forward(module) or replaced_in_class(original(type(module)))


def attention_of_others(configs: list[Any]) -> str | None:
    """Why attention is not what transformers itself computes by one of its implementations."""
    for config in configs:
        name = attentions.attention_of(config)
        if name is None:
            continue
        strange = f"its attention implementation {name!r} is not one of transformers' own"
        if torch.compiler.is_compiling():  # a graph goes by the name alone
            if name not in _KNOWN:
                return strange
            continue
        function = attentions.attention_function(name)
        if function is None and name != "eager":
            return f"its attention implementation {name!r} is not registered"
        home = "transformers" if function is None else _origin(function)[0]
        if "paged" in name or not (is_of(home, "transformers") or is_of(home, "fastvlm")):
            return strange
    return None


def as_written(attention: Any) -> bool:
    """Whether an attention must run as its authors wrote it: it was given another attention
    function, or somebody looks at a part of it."""
    if torch.compiler.is_compiling() and any(map(is_watched, attention.children())):
        return True
    config = getattr(attention, "config", None)
    if config is not None and attention_of_others([config]) is not None:
        return True
    return any(
        is_watched(part) and (foreign_hook(part) or own_forward(part))
        for part in attention.children()
    )
