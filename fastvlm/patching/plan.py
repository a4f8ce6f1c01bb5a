"""What a patch will change: found by the rules of the families, before anything is touched."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fastvlm.compat.versions import attention_refused
from fastvlm.models.embedding import factor_of
from fastvlm.models.spec import Layer, Stack
from fastvlm.models.structure import takes
from fastvlm.nn.linear import Linear, TransposedLinear, is_transposed
from fastvlm.patching import foreign, interposed, probe
from fastvlm.patching.classes import PatchError, is_patched
from fastvlm.patching.report import Entry
from fastvlm.patching.rules import Rule, StackRule, Swap, spec_of
from fastvlm.patching.weights import (
    LINEAR,
    adapters_of,
    choose_conv,
    choose_linear,
    compute_of,
    ops_in,
    read_at_a_step,
    runs_in,
    stays_as_it_is,
    storage_of,
)


@dataclass
class Change:
    name: str
    module: nn.Module
    floors: tuple[str, ...]
    swap: Swap | None
    reason: str | None = None
    at_each_step: bool = False  # a linear layer whose weight every decoding step reads


def plan(
    model: nn.Module, wanted: frozenset[str], weights: str | None, compute: str | None = None
) -> list[Change]:
    # imported here: fastvlm's ops stand without transformers
    if importlib.util.find_spec("transformers") is None:
        raise PatchError("fastvlm.patch needs transformers: pip install 'fastvlm[hf]'")
    from fastvlm.patching.families import (
        STACKS,
        left_alone,
        refusals,
        tower_convs,
        tower_linears,
        tower_parts,
    )

    changes: list[Change] = []
    seen: set[int] = set()

    def add(change: Change) -> None:
        if id(change.module) not in seen:
            seen.add(id(change.module))
            changes.append(change)

    shared: dict[nn.Module, Stack] = {}  # stacks that read one copy of the encoder's states
    others = refusals(model)
    for name, module in model.named_modules():
        stack = next((s for s in STACKS if s.matches(module)), None)
        if stack is not None:
            refused = attention_refused() or others.get(module)
            storage = weights if stack.decodes else None
            numbers = storage, compute
            spec = _plan_stack(name, module, stack, wanted, numbers, refused, add)
            if spec is not None and spec.reads_encoder:
                shared[module] = spec
    parts = probe.PartTrials()
    for name, module, rule, known in tower_parts(model):
        choice = parts.choice(module, _choose(module, rule, wanted), known)
        add(_change(name, module, rule.floors, choice))
    if changes:
        for name, module in model.named_modules():
            _plan_outside(name, module, wanted, weights, shared, add)
        adapters = {part for module in model.modules() for part in adapters_of(module)}
        for name, linear in tower_linears(model):
            if _is_linear(linear):
                arithmetic = None if linear in adapters else compute
                add(
                    _change(
                        name, linear, ("linear",), _choose_linear(linear, wanted, None, arithmetic)
                    )
                )
        for name, conv in tower_convs(model):
            arithmetic = None if conv in adapters else compute
            add(_change(name, conv, ("linear",), _choose_conv(conv, wanted, arithmetic)))
        for name, module, reason in left_alone(model):
            add(Change(name, module, (), None, reason))
    return changes


def _plan_stack(
    prefix: str,
    stack: nn.Module,
    rule: StackRule,
    wanted: frozenset[str],
    numbers: tuple[str | None, str | None],
    refused: str | None,
    add: Any,
) -> Stack | None:
    """The changes in one stack; its spec if it is patched.

    numbers: in what its linear layers keep their weights, and compute many rows.
    refused: a reason why its attention stays with transformers, whatever the rules say.
    """
    found = []
    weights, compute = numbers
    own_head = _head_of(stack)
    kept: set[nn.Module] = set()  # linear layers whose weight is read as it is
    per_image: set[nn.Module] = set()
    for name, module in stack.named_modules(prefix=prefix):
        kept.update(adapters_of(module))
        inner = next((r for r in rule.rules if module is not stack and r.matches(module)), None)
        if module is own_head:
            continue  # of the model, which makes it what it must be for a loss
        if inner is not None:
            found.append((name, module, inner, _choose(module, inner, wanted)))
            per_image.update(_projections_of_images(name, module, inner))
        elif _is_linear(module) or (numbers != (None, None) and isinstance(module, nn.Linear)):
            storage = None if module in kept | per_image else weights
            arithmetic = None if module in kept else compute
            choice = _choose_linear(module, wanted, storage, arithmetic)
            found.append((name, module, _LINEAR, choice))
    attention = [(n, c) for n, _, r, c in found if r.floors == ("attention",)]
    chosen = refused or _choose(stack, Rule(("attention",), rule.matches, rule.choose), wanted)
    bad = next(((n, c) for n, c in attention if isinstance(c, str)), None)
    if bad is not None and not isinstance(chosen, str):
        chosen = bad[1] if "not in only" in bad[1] else f"{bad[0]} was skipped ({bad[1]})"
    if not isinstance(chosen, str):
        patched = {m for _, m, _, choice in found if isinstance(choice, Swap)}
        chosen = _in_the_way(stack, chosen, patched) or chosen
    chosen, found = _tried(stack, rule, chosen, found)
    add(_change(prefix, stack, ("attention",), chosen))
    for name, module, inner, choice in found:
        if isinstance(chosen, str) and isinstance(choice, Swap) and _needs_stack(inner, choice):
            choice = f"its stack {prefix} was skipped"
        step = inner is _LINEAR and rule.decodes and module not in per_image
        add(_change(name, module, inner.floors, choice, step))
    return spec_of(chosen) if isinstance(chosen, Swap) else None


def _needs_stack(rule: Rule, swap: Swap) -> bool:
    """Whether a part does nothing of its own where its stack is not patched."""
    if rule.floors == ("attention",):
        return True
    spec = dict(swap.attributes).get("spec")
    return isinstance(spec, Layer) and spec.bypasses


def _in_the_way(stack: Any, swap: Swap, patched: set[nn.Module]) -> str | None:
    """Why a stack stays with transformers though the rules would have it."""
    spec = spec_of(swap)
    reason = interposed.look(stack, spec, patched.__contains__).unfused
    reason = reason or interposed.without_kernel(stack, spec)
    return reason or foreign.attention_of_others(interposed.configs_of(stack, spec))


def _tried(
    stack: nn.Module, rule: StackRule, chosen: Swap | str, found: list[Any]
) -> tuple[Swap | str, list[Any]]:
    """The choices for a stack and its parts, less those that a trial speaks against."""
    swaps = {m: choice for _, m, inner, choice in found if inner is not _LINEAR}
    together = {m for _, m, inner, _ in found if inner.floors == ("attention",)} | {stack}
    swaps[stack] = chosen
    if isinstance(chosen, str):
        swaps = {m: choice for m, choice in swaps.items() if m not in together}
    wanted = {m: choice for m, choice in swaps.items() if isinstance(choice, Swap)}
    refused = probe.try_stack(stack, rule, wanted, together)
    found = [(n, m, inner, refused.get(m, choice)) for n, m, inner, choice in found]
    return refused.get(stack, chosen), found


def _plan_outside(
    name: str,
    module: Any,
    wanted: frozenset[str],
    weights: str | None,
    shared: dict[nn.Module, Stack],
    add: Any,
) -> None:
    """The head, and the class that generates and has a loss."""
    from fastvlm.patching import families, language_model, tied

    head = _head_of(module)
    # asked of the class: a wrapper (PEFT) passes on the attributes of the model inside it
    trains = head is not None and hasattr(type(module), "get_output_embeddings")
    trains = trains and takes(module, "labels") and hasattr(module, "config")
    trains = trains and not any(stack.matches(module) for stack in families.STACKS)
    loops = "loss" in wanted or language_model.runs_loop(module)
    other = foreign.other_forward(module) if trains and not is_patched(module) else None
    loops = loops and trains and _is_linear(head) and other is None
    loss = loops and weights is None and ("loss" in wanted or language_model.has_loss(module))
    if head is not None and (_is_linear(head) or weights is not None):
        at = next(n for n, m in module.named_modules(prefix=name) if m is head)
        choice = _choose_linear(head, wanted, weights)
        if loss:
            choice = language_model.head(head, isinstance(choice, Swap))
        add(_change(at, head, ("linear",), choice, True))
    generates = hasattr(type(module), "_expand_inputs_for_generation") and head is not None
    kept = "attention" in wanted or language_model.shares_states(module)
    shares = kept and generates and _shares_states(module, shared)
    for inner, part in module.named_modules(prefix=name) if loss else ():
        if isinstance(part, nn.Embedding) and part.weight is head.weight:
            choice = tied.choose(part)
            if isinstance(choice, Swap):
                choice = probe.try_embedding(part, factor_of, families.KNOWN) or choice
            add(_change(inner, part, ("loss",), choice))
    loops = loops and generates
    if shares or loss or loops:
        known = probe.home(module).startswith(families.LANGUAGE_MODELS)
        choice = language_model.choose(shares, loss, loops, known)
        add(_change(name, module, ("attention", "loss"), choice))
    elif trains and "loss" in wanted:
        why = "weights= is for decoding" if weights else f"its head {type(head).__name__} is called"
        why = other or why
        add(_change(name, module, ("loss",), why))


def _head_of(module: Any) -> Any:
    """The head over tokens that a model, or a stack that has one, says it has."""
    return getattr(module, "get_output_embeddings", lambda: None)()


def _shares_states(module: Any, shared: dict[nn.Module, Stack]) -> bool:
    """Whether a model that generates gives its stack one copy of the encoder's states."""
    from fastvlm.patching import language_model

    if language_model.shares_states(module):
        return True
    if module.config.is_encoder_decoder:
        return bool(shared)
    found = [shared[part] for part in module.modules() if part in shared]
    return any(spec.wraps_cache or spec.interleaved for spec in found)


def _is_linear(module: nn.Module) -> bool:
    if not is_patched(module):
        return type(module) is nn.Linear or is_transposed(module)
    return isinstance(module, (Linear, TransposedLinear)) or getattr(
        module, "gives_lazy_logits", False
    )


_LINEAR = Rule(("linear",), _is_linear, lambda m: LINEAR)


def _choose_linear(
    module: nn.Module, wanted: frozenset[str], storage: str | None, compute: str | None = None
) -> Swap | str:
    missing = _missing(_LINEAR, wanted) or foreign.other_forward(module)
    if missing is None and not _is_linear(module):
        return f"{type(module).__name__} is called as it is: it does more than nn.Linear"
    return missing or choose_linear(module, storage, compute)


def _choose_conv(module: nn.Module, wanted: frozenset[str], compute: str | None) -> Swap | str:
    missing = _missing(_LINEAR, wanted) or foreign.other_forward(module)
    return missing or choose_conv(module, compute)


def _projections_of_images(name: str, attention: Any, rule: Rule) -> list[nn.Module]:
    """The key and value projections of a cross-attention: they run once for an image.

    One that may be either, by what it says of itself, is told by its name.
    """
    if rule.floors != ("attention",):
        return []
    swap = rule.choose(attention) if not is_patched(attention) else type(attention)._fastvlm_swap
    if not isinstance(swap, Swap) or "cross_attention" not in swap.runs_on:
        return []
    if "self_attention" in swap.runs_on and name.endswith((".self_attn", ".attention.self")):
        return []
    spec = spec_of(swap)
    names = ("k_proj", "v_proj") if spec.fused is None else (spec.fused,)
    return [getattr(attention, spec.name(part)) for part in names]


def _missing(rule: Rule, wanted: frozenset[str]) -> str | None:
    missing = set(rule.floors) - wanted
    return f"not in only: {', '.join(sorted(missing))}" if missing else None


def _choose(module: nn.Module, rule: Rule, wanted: frozenset[str]) -> Swap | str:
    if missing := _missing(rule, wanted):
        return missing
    if is_patched(module):
        swap: Swap = type(module)._fastvlm_swap  # type: ignore[attr-defined]
        return swap
    return foreign.other_forward(module) or rule.choose(module)


def _change(
    name: str,
    module: nn.Module,
    floors: tuple[str, ...],
    choice: Swap | str,
    at_each_step: bool = False,
) -> Change:
    swap, reason = (None, choice) if isinstance(choice, str) else (choice, None)
    return Change(name, module, floors, swap, reason, at_each_step)


def streamed(changes: list[Change]) -> list[Tensor]:
    """The weights that a decoding step reads as they are."""
    layers = (c for c in changes if c.at_each_step and c.swap and storage_of(c.swap) is None)
    weights = (getattr(change.module, "weight", None) for change in layers)
    return [weight for weight in weights if isinstance(weight, Tensor)]


_MLPS = ("gelu_mlp", "geglu_mlp")


def entries_of(changes: list[Change], weights: str | None) -> list[Entry]:
    low = {id(change.module) for change in changes if storage_of(change.swap) is not None}
    narrow = {id(change.module): compute_of(change.swap) for change in changes}
    entries = []
    for change in changes:
        runs_on = () if change.swap is None else change.swap.runs_on
        kind = narrow[id(change.module)]
        if kind is not None and stays_as_it_is(kind, change.module):
            runs_on = tuple(op for op in runs_on if op != ops_in(kind)[0])
        if any(id(part) in low for part in change.module.children()):
            # an MLP of such layers calls them one by one
            runs_on = tuple("low_precision_linear" if op in _MLPS else op for op in runs_on)
        else:
            kinds = {narrow.get(id(part)) for part in change.module.modules()} - {None}
            for each in kinds:
                others = runs_in(str(each))
                more = dict.fromkeys(others[op] for op in runs_on if op in others)
                runs_on = (*runs_on, *more)
        entry = Entry(change.name, type(change.module).__name__, runs_on, change.reason)
        if weights is not None and change.at_each_step:
            entry = replace(entry, reads=read_at_a_step(change.module, storage_of(change.swap)))
        entries.append(entry)
    return entries
