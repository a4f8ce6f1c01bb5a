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
    layers = layers_of(stack)
    return unwrapped(layers[0], name) if layers else None


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


def layers_and_owner(stack: Any) -> tuple[Any, Any]:
    """The ModuleList of a stack's layers, by the names that families have for it, and the module
    that holds it: the stack, or its encoder (BERT); None and None without."""
    owners = [(stack, "layers"), (stack, "block"), (stack, "h"), (stack, "layer")]
    inner = stack._modules.get("encoder")
    owners.append((None if inner is None else unwrapped(inner, "layer"), "layer"))
    for owner, name in owners:
        found = None if owner is None else owner._modules.get(name)
        if isinstance(found, nn.ModuleList):
            return found, owner
    return None, None


def layers_of(stack: Any) -> Any:
    """The ModuleList of a stack's layers; None without."""
    return layers_and_owner(stack)[0]


def part_of(module: Any, path: str) -> Any:
    """What an attribute, or a path of attributes, of a module leads to."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def layer_in(outer: Any, path: str) -> Any:
    """The layer that owns what a path begins with, in wrappers of a single child; None without."""
    return unwrapped(outer, path.partition(".")[0])


def attention_in(outer: Any) -> Any:
    """The attention in wrappers of a single child; None where there is none."""
    found = (unwrapped(outer, name) for name in ("q_proj", "q", "query", "c_attn"))
    return next((each for each in found if each is not None), None)


def submodule(module: Any, path: str) -> Any:
    """The module to which a path of names leads; None where there is none."""
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module
