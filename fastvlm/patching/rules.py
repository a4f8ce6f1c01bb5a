"""What becomes of a module: the class that takes over, and the rules by which it is chosen."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from fastvlm.compat.versions import TESTED_NAMES

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
