"""Whose attribute is it: a module's own, or one that it passes on from what it wraps?

Wrappers (activation checkpointing, FSDP, PEFT, torch.compile, a user's own) answer for the module
they hold, so that hasattr takes them for it.
"""

from __future__ import annotations

from typing import Any


def owns(module: Any, name: str) -> bool:
    """Whether an attribute is the module's own."""
    own = vars(module)
    if name in own or hasattr(type(module), name):
        return True
    return any(name in own[kind] for kind in ("_modules", "_parameters", "_buffers"))


def unwrapped(module: Any, name: str) -> Any:
    """The module that owns an attribute: this, or one in wrappers of a single child; else None."""
    while not owns(module, name):
        children = [child for child in module._modules.values() if child is not None]
        if len(children) != 1:
            return None
        (module,) = children
    return module
