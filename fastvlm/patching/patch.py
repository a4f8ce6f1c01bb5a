"""fastvlm.patch: put the kernels into one instance of a model, and take them out again.

A patched module keeps its parameters, buffers, name and place; only its class changes, to a
subclass of its own class whose ``forward`` is ours. So ``isinstance``, ``state_dict``, hooks,
pickle, deepcopy, DDP, FSDP and PEFT go on working, no class or module of another library is
touched, and the way back is to give the module its class again.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from fastvlm.nn.linear import Linear
from fastvlm.patching.report import Entry, Report
from fastvlm.patching.rules import FLOORS, Rule, StackRule, Swap, too_old


class PatchError(ValueError):
    """Nothing could be patched, or with strict=True something was skipped."""


@dataclass
class _Change:
    name: str
    module: nn.Module
    floors: tuple[str, ...]
    swap: Swap | None
    reason: str | None = None


@cache
def _swapped(base: Any, swap: Swap) -> Any:
    """The subclass of base with swap's forward; by all names the same class as base."""
    return type(base)(
        base.__name__,
        (swap.mixin, base),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce,
            "_fastvlm_base": base,
            "_fastvlm_swap": swap,
            **dict(swap.attributes),
        },
    )


def _rebuild(base: Any, swap: Swap) -> Any:
    cls = _swapped(base, swap)
    return cls.__new__(cls)


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle by base and swap: the subclass itself has no importable name."""
    cls = type(module)
    return _rebuild, (cls._fastvlm_base, cls._fastvlm_swap), module.__dict__  # type: ignore[attr-defined]


def is_patched(module: nn.Module) -> bool:
    return "_fastvlm_base" in vars(type(module))


def patch(
    model: nn.Module, *, only: Collection[str] | str | None = None, strict: bool = False
) -> Report:
    """Make a model train and decode on fastvlm's ops, in place; outputs stay the same.

    model: a transformers model (Florence-2, BART, mBART, Gemma-2, T5Gemma, PaliGemma 2), one with
    the same structure, or a module that contains one (a trainer's wrapper, a PEFT model). Only
    this instance changes. Patching twice changes nothing more.
    only: the kinds of ops to patch in, of "attention", "mlp", "norm", "linear"; None for all.
    strict: make any skipped module an error.

    Returns the Report of what was patched with which op, and what was skipped and why.

    Raises TypeError for what is no nn.Module, ValueError for an unknown name in only, PatchError
    (a ValueError) where nothing matches, or something was skipped and strict is set. After an
    error the model is exactly as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastvlm.patch: model must be a torch.nn.Module; got {type(model)!r}")
    wanted = _wanted(only)
    changes = _plan(model, wanted)
    report = Report(type(model).__name__, [_entry(change) for change in changes])
    if not report.patched:
        why = "; ".join(sorted({f"{e.module}: {e.reason}" for e in report.skipped}))
        raise PatchError(
            f"fastvlm.patch: model must contain a Florence-2, BART, mBART, Gemma-2, T5Gemma or "
            f"PaliGemma decoder, or modules of that structure; got {type(model).__name__}, in "
            f"which nothing can be patched{' (' + why + ')' if why else ''}"
        )
    if strict and report.skipped:
        skipped = "; ".join(f"{e.module}: {e.reason}" for e in report.skipped)
        raise PatchError(f"fastvlm.patch: strict is set and modules were skipped: {skipped}")
    for change in changes:
        if change.swap is not None and not is_patched(change.module):
            base: Any = type(change.module)
            change.module.__class__ = _swapped(base, change.swap)
    return report


def unpatch(model: nn.Module) -> None:
    """Take all of fastvlm out of a patched model; it is exactly as before.

    Raises TypeError for what is no nn.Module, PatchError where a patched module's class was wrapped
    by another library since (then nothing is changed). A model that is not patched is left alone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastvlm.unpatch: model must be a torch.nn.Module; got {type(model)!r}")
    for name, module in model.named_modules():
        if not is_patched(module) and hasattr(type(module), "_fastvlm_base"):
            raise PatchError(
                f"fastvlm.unpatch: {name} was wrapped after patching by {type(module).__name__}; "
                "undo that first"
            )
    for module in model.modules():
        if is_patched(module):
            module.__class__ = type(module)._fastvlm_base  # type: ignore[attr-defined]


@contextlib.contextmanager
def patched(
    model: nn.Module, *, only: Collection[str] | str | None = None, strict: bool = False
) -> Iterator[Report]:
    """``with fastvlm.patched(model):`` patch inside the block only; yields the Report.

    Arguments and errors: as `patch`. A model that was patched before the block stays so after it.
    """
    before = {module for module in model.modules() if is_patched(module)}
    report = patch(model, only=only, strict=strict)
    try:
        yield report
    finally:
        for module in model.modules():
            if is_patched(module) and module not in before:
                module.__class__ = type(module)._fastvlm_base  # type: ignore[attr-defined]


def _wanted(only: Collection[str] | str | None) -> frozenset[str]:
    if only is None:
        return frozenset(FLOORS)
    names = frozenset([only] if isinstance(only, str) else only)
    if not names or not names <= set(FLOORS):
        allowed = ", ".join(repr(floor) for floor in FLOORS)
        raise ValueError(f"fastvlm.patch: only must name some of {allowed}; got {only!r}")
    return names


def _entry(change: _Change) -> Entry:
    kind = type(change.module).__name__
    if change.swap is None:
        return Entry(change.name, kind, (), change.reason)
    return Entry(change.name, kind, change.swap.runs_on)


def _plan(model: nn.Module, wanted: frozenset[str]) -> list[_Change]:
    # imported here: fastvlm's ops stand without transformers
    if importlib.util.find_spec("transformers") is None:
        raise PatchError("fastvlm.patch needs transformers: pip install 'fastvlm[hf]'")
    from fastvlm.patching.families import (
        PREFIX_MASK,
        STACKS,
        left_alone,
        prefix_decoders,
        tower_linears,
    )

    changes: list[_Change] = []
    seen: set[int] = set()

    def add(change: _Change) -> None:
        if id(change.module) not in seen:
            seen.add(id(change.module))
            changes.append(change)

    shares, prefixed = False, prefix_decoders(model)
    for name, module in model.named_modules():
        stack = next((s for s in STACKS if s.matches(module)), None)
        if stack is not None:
            refused = too_old() or (PREFIX_MASK if module in prefixed else None)
            shares |= _plan_stack(name, module, stack, wanted, refused, add)
    if changes:
        for name, module in model.named_modules():
            _plan_outside(name, module, wanted, shares, add)
        for name, linear in tower_linears(model):
            if type(linear) is nn.Linear or _is_patched_linear(linear):
                add(_change(name, linear, ("linear",), _choose(linear, _LINEAR, wanted)))
        for name, module, reason in left_alone(model):
            add(_Change(name, module, (), None, reason))
    return changes


def _plan_stack(
    prefix: str,
    stack: nn.Module,
    rule: StackRule,
    wanted: frozenset[str],
    refused: str | None,
    add: Any,
) -> bool:
    """The changes in one stack; True if it is patched and shares encoder states among readers.

    refused: a reason why its attention stays with transformers, whatever the rules say.
    """
    found = []
    for name, module in stack.named_modules(prefix=prefix):
        inner = next((r for r in rule.rules if module is not stack and r.matches(module)), None)
        if inner is not None:
            found.append((name, module, inner, _choose(module, inner, wanted)))
        elif type(module) is nn.Linear or _is_patched_linear(module):
            choice = _choose(module, _LINEAR, wanted)
            found.append((name, module, _LINEAR, choice))
    attention = [(n, c) for n, _, r, c in found if r.floors == ("attention",)]
    chosen = refused or _choose(stack, Rule(("attention",), rule.matches, rule.choose), wanted)
    bad = next(((n, c) for n, c in attention if isinstance(c, str)), None)
    if bad is not None and not isinstance(chosen, str):
        chosen = bad[1] if "not in only" in bad[1] else f"{bad[0]} was skipped ({bad[1]})"
    add(_change(prefix, stack, ("attention",), chosen))
    for name, module, inner, choice in found:
        if inner.floors == ("attention",) and isinstance(chosen, str) and isinstance(choice, Swap):
            choice = f"its stack {prefix} was skipped"
        add(_change(name, module, inner.floors, choice))
    return isinstance(chosen, Swap) and getattr(chosen.mixin, "has_cross_attention", False)


def _plan_outside(name: str, module: Any, wanted: frozenset[str], shares: bool, add: Any) -> None:
    """The head, and the class that generates."""
    from fastvlm.patching.stacks import SharedEncoderStates

    head = getattr(module, "get_output_embeddings", lambda: None)()
    if head is not None and (type(head) is nn.Linear or _is_patched_linear(head)):
        at = next(n for n, m in module.named_modules(prefix=name) if m is head)
        add(_change(at, head, ("linear",), _choose(head, _LINEAR, wanted)))
    # asked of the class: a wrapper (PEFT) passes on the attributes of the model inside it
    generates = hasattr(type(module), "_expand_inputs_for_generation") and hasattr(
        module, "lm_head"
    )
    if shares and "attention" in wanted and generates and module.config.is_encoder_decoder:
        swap = Swap(SharedEncoderStates, ("one copy of the encoder states",))
        add(_change(name, module, ("attention",), swap))


def _is_patched_linear(module: nn.Module) -> bool:
    return is_patched(module) and isinstance(module, Linear)


_LINEAR = Rule(("linear",), lambda m: type(m) is nn.Linear, lambda m: Swap(Linear, ("linear",)))


def _choose(module: nn.Module, rule: Rule, wanted: frozenset[str]) -> Swap | str:
    missing = set(rule.floors) - wanted
    if missing:
        return f"not in only: {', '.join(sorted(missing))}"
    if is_patched(module):
        swap: Swap = type(module)._fastvlm_swap  # type: ignore[attr-defined]
        return swap
    return rule.choose(module)


def _change(name: str, module: nn.Module, floors: tuple[str, ...], choice: Swap | str) -> _Change:
    if isinstance(choice, str):
        return _Change(name, module, floors, None, choice)
    return _Change(name, module, floors, choice)
