"""What becomes of a module: the class that takes over, and the rules by which it is chosen."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastvlm.compat import hf
from fastvlm.compat.versions import TESTED_NAMES
from fastvlm.models.structure import part_of

FLOORS = ("attention", "mlp", "norm", "linear", "loss")


@dataclass(frozen=True)
class Alias:
    """In place of an attribute of a class: what another of its instances', or a path, leads to."""

    name: str

    def descriptor(self) -> property:
        return property(lambda module: part_of(module, self.name))


@dataclass(frozen=True)
class Swap:
    """The class whose forward takes over, what that runs on, and class attributes it needs.

    An `Alias` among these becomes a property: pickle keeps a swap, and no property.
    """

    mixin: type[nn.Module]
    runs_on: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...] = ()


def spec_of(swap: Swap) -> Any:
    """What describes the modules that a swap is for (`fastvlm.models.spec`)."""
    return dict(swap.attributes)["spec"]


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


def mistaken(module: nn.Module, arguments: tuple[str, ...]) -> str | None:
    """Why our forward cannot take over from a module's; None where it can.

    arguments: of ours. Whoever calls the module gives the first arguments by
    place, in the module's order, and further ones by name: the layouts are among these.
    """
    theirs = list(inspect.signature(type(module).forward).parameters.values())[1:]
    placed = tuple(p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD)
    ours = tuple(hf.cache_argument() if n == "past_key_values" else n for n in arguments)
    if placed[: len(ours)] != ours:
        return f"its forward has other arguments than {TESTED_NAMES}: {', '.join(placed)}"
    if not any(p.kind is p.VAR_KEYWORD for p in theirs):
        return f"its forward takes no further keyword arguments, as in {TESTED_NAMES}"
    return None
