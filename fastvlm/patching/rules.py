"""How modules are recognised: by structure, so that a trainer's own copy of a class is found."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from fastvlm.compat.versions import TESTED_NAMES
from fastvlm.nn.wrapped import owns, unwrapped

if TYPE_CHECKING:

    class Host(nn.Module):
        """A class whose forward takes over from another's: it finds that one's attributes."""

        def __getattr__(self, name: str) -> Any: ...

else:
    Host = nn.Module

FLOORS = ("attention", "mlp", "norm", "linear", "loss")


@dataclass(frozen=True)
class Swap:
    """The class whose forward takes over, what that runs on, and class attributes it needs."""

    mixin: type[nn.Module]
    runs_on: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Rule:
    """One kind of module: the ops it gets, how it is recognised, and what takes over.

    choose gives a Swap, or the reason why this one stays as it is.
    """

    floors: tuple[str, ...]
    matches: Callable[[nn.Module], bool]
    choose: Callable[[nn.Module], Swap | str]


@dataclass(frozen=True)
class StackRule:
    """A stack of layers and the rules for the modules in it.

    Its attention modules and the stack are patched together or not at all: the stack hands down
    the layouts instead of masks, so each of them must understand layouts. decodes: whether it runs
    at each decoding step. known: the modules whose classes the tests build; any other class is
    tried before it is patched (`fastvlm.patching.probe`).
    """

    matches: Callable[[nn.Module], bool]
    choose: Callable[[nn.Module], Swap | str]
    rules: tuple[Rule, ...]
    decodes: bool = True
    known: tuple[str, ...] = ()


def mistaken(module: nn.Module, forward: type[nn.Module]) -> str | None:
    """Why a class's forward cannot take over from a module's; None where it can.

    Whoever calls the module gives the first arguments by place, in the module's order, and further
    ones by name: the layouts are among these.
    """
    theirs, ours = (
        list(inspect.signature(function).parameters.values())[1:]
        for function in (type(module).forward, forward.forward)
    )
    placed = [[p.name for p in ps if p.kind is p.POSITIONAL_OR_KEYWORD] for ps in (theirs, ours)]
    if placed[0][: len(placed[1])] != placed[1]:
        return f"its forward has other arguments than {TESTED_NAMES}: {', '.join(placed[0])}"
    if not any(p.kind is p.VAR_KEYWORD for p in theirs):
        return f"its forward takes no further keyword arguments, as in {TESTED_NAMES}"
    return None


def choose_stack(forward: type[nn.Module]) -> Callable[[nn.Module], Swap | str]:
    """The choice of a StackRule whose stack gets this class's forward."""
    return lambda stack: mistaken(stack, forward) or Swap(forward, ("Layout",))


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


def extra_parts(module: nn.Module, *known: str) -> str | None:
    """A reason to leave a module alone: it has submodules or parameters that we know nothing of.

    Classes that grew from the ones we know keep their attributes and add to what they compute
    (Gemma-3 normalizes q and k).
    """
    own = [name for name, _ in module.named_children()]
    own += [name for name, _ in module.named_parameters(recurse=False)]
    extra = sorted(set(own) - set(known))
    return f"it has parts of its own: {', '.join(extra)}" if extra else None


def takes(module: nn.Module, *names: str) -> bool:
    """Whether module.forward has parameters of these names."""
    return set(names) <= set(inspect.signature(type(module).forward).parameters)
