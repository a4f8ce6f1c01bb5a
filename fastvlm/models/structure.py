"""How modules are recognised: by structure, so that a trainer's own copy of a class is found."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from fastvlm.nn.wrapped import owns, unwrapped


def has(*names: str) -> Callable[[nn.Module], bool]:
    """A test for the presence of attributes of a module's own."""
    return lambda module: all(owns(module, name) for name in names)


def first_layer(stack: Any, name: str) -> Any:
    """The first layer of a stack if it has, or wraps what has, a part of this name; else None."""
    layers = stack._modules.get("layers")
    return unwrapped(layers[0], name) if isinstance(layers, nn.ModuleList) and layers else None


def hands_down(module: nn.Module) -> bool:
    """Whether module.forward takes any keyword argument."""
    kinds = {p.kind for p in inspect.signature(type(module).forward).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def takes(module: nn.Module, *names: str) -> bool:
    """Whether module.forward has parameters of these names."""
    return set(names) <= set(inspect.signature(type(module).forward).parameters)


def extra_parts(module: nn.Module, *known: str) -> str | None:
    """A reason to leave a module alone: it has submodules or parameters that we know nothing of.

    Classes that grew from the ones we know keep their attributes and add to what they compute
    (Gemma-3 normalizes q and k).
    """
    own = [name for name, _ in module.named_children()]
    own += [name for name, _ in module.named_parameters(recurse=False)]
    extra = sorted(set(own) - set(known))
    return f"it has parts of its own: {', '.join(extra)}" if extra else None
