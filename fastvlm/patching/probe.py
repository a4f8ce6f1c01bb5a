"""Known or probed: what only looks like a class that fastvlm knows is tried before it is patched.

A class is known by the path of its module, in the versions that the tests build it in. Any other
(a trainer's copy, a subclass, a newer release, a class that merely has the names) may compute
something else with the same parts: so a small replica of it (`fastvlm.patching.replica`) is run,
its own forward against ours, in float64: a stack with one layer of each kind, behind the first
where that hands its bias on, padded, with and without a cache, with gradients; norms and MLPs by
themselves. What differs is left alone, and the report says by how much.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.compat.versions import is_tested
from fastvlm.models.embedding import with_own_row
from fastvlm.models.spec import Layer
from fastvlm.models.structure import layers_of, takes
from fastvlm.nn.linear import inputs_of
from fastvlm.ops import dispatch
from fastvlm.patching import trials
from fastvlm.patching.classes import become, swapped, unpatched_class
from fastvlm.patching.replica import DTYPE, ROWS, Float64, Replica, signature, without_weights
from fastvlm.patching.rules import StackRule, Swap, spec_of

# of what is compared, relative to the largest: both sides are float64
SAME = 1e-6
MOST_KINDS = 8  # of layers in a stack: each takes about a tenth of a second
# where a linear layer sits: adapters and quantized ones are called, so they need not be known
_SLOTS = frozenset((
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "q", "k", "v", "o", "query", "key", "value",
    "dense", "fc1", "fc2", "gate_proj", "up_proj", "down_proj", "wi", "wi_0", "wi_1", "wo",
    "c_attn", "q_attn", "c_proj", "c_fc",
))  # fmt: skip
# what is called, whatever it computes, or has nothing to compute
_HARMLESS_HOMES = (
    "torch",
    "transformers.activations",
    "fastvlm.nn",
    "peft",
    *("accelerate", "bitsandbytes", "torchao"),
)


def home(module: nn.Module) -> str:
    """The path of the class's module; of the class behind it where FSDP2 or torch put their own."""
    classes = [c for c in unpatched_class(module).__mro__ if issubclass(c, nn.Module)]
    paths = [c.__module__ for c in classes]
    return next((p for p in paths if not _within(p, ("torch",))), paths[0])


def _within(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """A module and what is in it, but for what sits where a linear layer does."""
    yield module
    for name, child in module.named_children():
        if name not in _SLOTS:
            yield from _parts(child)


def stranger(module: nn.Module, known: tuple[str, ...]) -> str | None:
    """The name of a class in module that is not known, or None."""
    for part in _parts(module):
        if not _within(home(part), (*known, *_HARMLESS_HOMES)):
            return f"{home(part)}.{unpatched_class(part).__name__}"
    return None


@dataclass
class Trial:
    """The modules of a stack that are to change, and what is found about them.

    swaps: by module. refused: the reasons against some of them.
    """

    swaps: dict[nn.Module, Swap]
    refused: dict[nn.Module, str] = field(default_factory=dict)

    def refuse(self, modules: list[nn.Module], reason: str) -> None:
        for module in modules:
            if self.swaps.pop(module, None) is not None:
                self.refused[module] = reason


def try_stack(
    stack: Any, rule: StackRule, swaps: dict[nn.Module, Swap], together: set[nn.Module]
) -> dict[nn.Module, str]:
    """The modules of a stack that must stay as they are though the rules would change them.

    swaps: what the rules would do. together: the stack and its attentions, which change together
    or not at all. -> for each that is left alone, why.
    """
    if (why := _why(stack, rule.known)) is None:
        return {}
    trial = Trial(dict(swaps))
    if missing := without_weights(stack):
        trial.refuse(list(swaps), f"{why}, and its weights are {missing}: nothing can be tried")
        return trial.refused
    parts = PartTrials()
    for module, swap in swaps.items():
        if not _is_layer(swap):
            difference = parts.difference(module, swap)
            if difference is not None:
                trial.refuse([module], f"{why}, and {difference}")
    layers = {m for m, swap in trial.swaps.items() if _is_layer(swap)} - together
    kinds: dict[Any, int] = {}
    for index, layer in enumerate(layers_of(stack)):
        kinds.setdefault(signature(layer), index)
    if len(kinds) > MOST_KINDS:
        reason = f"{why}, and its layers are of {len(kinds)} kinds: too many to try"
        trial.refuse([*together, *layers], reason)
        return trial.refused
    for index in kinds.values():
        _try_layer(stack, index, trial, together, layers, why)
    return trial.refused


def _is_layer(swap: Swap) -> bool:
    return isinstance(dict(swap.attributes).get("spec"), Layer)


def _try_layer(
    stack: Any,
    index: int,
    trial: Trial,
    together: set[nn.Module],
    layers: set[nn.Module],
    why: str,
) -> None:
    """The stack with one of its layers, both ways; what must go is refused in all its layers."""
    if not trial.swaps.keys() & (together | layers):
        return
    swap = trial.swaps.get(stack)
    hands_on = swap is not None and spec_of(swap).has_bias and index > 0
    replica = Replica((0, index) if hands_on else (index,))  # with the layer whose bias it gets
    copied = replica.of(stack, layers_of(stack))
    base, failed = _run(lambda: trials.answers(copied))
    if base is None:
        trial.refuse([*together, *layers], f"{why}, and it could not be tried: {failed}")
        return
    first = ""
    for without in (set(), layers, together, layers | together):
        swaps = {m: s for m, s in trial.swaps.items() if m not in without}
        difference = _difference(replica, copied, swaps, base)
        if difference is None:
            trial.refuse(list(without), f"{why}, and {first}")
            return
        first = first or difference
    trial.refuse([*layers, *together], f"{why}, and {first}")


def _difference(
    replica: Replica, copied: nn.Module, swaps: dict[nn.Module, Swap], base: list[Tensor]
) -> str | None:
    """How the answers change with these swaps, in words; None where they do not."""
    with _swapped(replica, swaps):
        ours, failed = _run(lambda: trials.answers(copied))
    if ours is None:
        return f"fastvlm's way of it fails ({failed})"
    return difference_of(base, ours)


def difference_of(theirs: list[Tensor], ours: list[Tensor]) -> str | None:
    if [t.shape for t in theirs] != [t.shape for t in ours]:
        return "fastvlm computes something of another shape"
    pairs = [(want, got) for want, got in zip(theirs, ours) if want.numel()]
    if not all(bool(want.isfinite().all()) for want, _ in pairs):
        return "what it computes is not finite, so nothing can be said of it"
    sizes = [float(want.abs().max()) for want, _ in pairs]
    # what cancels (the gradient of a bias of keys) is rounded at the scale of what it is a sum of
    least = max(sizes, default=0.0) / 1000
    off = 0.0
    for (want, got), size in zip(pairs, sizes):
        error = float((got - want).abs().max())
        if error != error:
            return "fastvlm's way of it gives NaN"
        off = max(off, error / max(size, least)) if error > 0 else off
    if off <= SAME:
        return None
    return f"it computes something else than fastvlm would ({off:.1g} of its size apart)"


@contextlib.contextmanager
def _swapped(replica: Replica, swaps: dict[nn.Module, Swap]) -> Iterator[None]:
    """Within it the copies of some modules have the classes that the originals are to get."""
    pairs = [(replica.copies.get(id(m)), swap) for m, swap in swaps.items()]
    for copied, swap in pairs:
        if copied is not None:
            cls: Any = type(copied)
            become(copied, swapped(cls, swap))
    try:
        yield
    finally:
        for copied, _ in pairs:
            if copied is not None:
                become(copied, unpatched_class(copied))


def _run(answers: Callable[[], list[Tensor]]) -> tuple[list[Tensor] | None, str]:
    try:
        with contextlib.ExitStack() as around:
            around.enter_context(torch.random.fork_rng(devices=[]))
            around.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of a call that nobody made
            around.enter_context(dispatch.use("reference"))
            around.enter_context(Float64())
            around.enter_context(torch.enable_grad())
            return answers(), ""
    except Exception as error:  # whatever a stranger's code may raise: it is left alone
        return None, f"{type(error).__name__}: {error}".split("\n")[0][:200]


class PartTrials:
    """Trials of parts by themselves, one for each class and configuration."""

    def __init__(self) -> None:
        self.kinds: dict[Any, str | None] = {}

    def difference(self, module: nn.Module, swap: Swap) -> str | None:
        """How a norm, an MLP or a tower's attention differs from ours; None: it does not."""
        kind = (signature(module), swap)
        if kind not in self.kinds:
            self.kinds[kind] = _try_part(module, swap)
        return self.kinds[kind]

    def choice(self, module: nn.Module, choice: Swap | str, known: tuple[str, ...]) -> Swap | str:
        """What is to become of a part of a vision tower: the choice, or the reason against it."""
        if isinstance(choice, str) or (why := _why(module, known)) is None:
            return choice
        if missing := without_weights(module):
            return f"{why}, and its weights are {missing}: nothing can be tried"
        if "conv1" in module._modules:  # half a block, which float64 does not fuse
            return f"{why}, and only its parts can be tried"
        difference = self.difference(module, choice)
        return choice if difference is None else f"{why}, and {difference}"


def _why(module: nn.Module, known: tuple[str, ...]) -> str | None:
    """Why a module is to be tried, or None for one that is known."""
    name = stranger(module, known)
    if name is not None:
        return f"{name} is not known"
    return None if is_tested("transformers") else "this version of transformers is not tested"


def try_embedding(
    module: Any, factor_of: Callable[[Any], float | None], known: tuple[str, ...]
) -> str | None:
    """Why an embedding does not give its rows times its factor; None where it does, or is known."""
    if (why := _why(module, known)) is None:
        return None
    if missing := without_weights(module):
        return f"{why}, and its weights are {missing}: nothing can be tried"
    copied: Any = Replica().of(module)
    ids = torch.arange(4, ROWS - 2).unsqueeze(0)
    theirs, failed = _run(lambda: [copied(ids).detach()])
    if theirs is None:
        return f"{why}, and it could not be tried: {failed}"
    ours = with_own_row(copied, ids, copied.weight[ids] * (factor_of(copied) or 0)).detach()
    difference = difference_of(theirs, [ours])
    return None if difference is None else f"{why}, and {difference}"


def _try_part(module: nn.Module, swap: Swap) -> str | None:
    replica = Replica()
    copied = replica.of(module)
    given = _given(copied, replica)
    if given is None:
        return None  # tried within its stack

    def answers() -> list[Tensor]:
        y = copied(*given)
        y = y[0] if isinstance(y, tuple) else y
        return [y.detach(), *torch.autograd.grad(y, given[0], torch.cos(y.detach()))]

    base, failed = _run(answers)
    if base is None:
        return f"it could not be tried: {failed}"
    with _swapped(replica, {module: swap}):
        ours, failed = _run(answers)
    if ours is None:
        return f"fastvlm's way of it fails ({failed})"
    return difference_of(base, ours)


def _given(module: Any, replica: Replica) -> tuple[Any, ...] | None:
    """What a part is called with; None for what does not take rows alone."""
    shape: tuple[int, ...] = (2, 6)
    size = (2, 3)
    if "qkv" in module._modules:
        width = module.qkv.in_features
        side = getattr(module, "window_size", None)
        if side is not None:  # more than one window, and padding in some
            size = (side + 1, side + 2)
            shape = (1, *size) if takes(module, "hidden_states") else (1, size[0] * size[1])
    elif (first := _first(module, "gate_proj fc1 wi_0 wi c_fc")) is not None:
        width = inputs_of(first)
    else:
        weight = module._parameters.get("weight")
        if not isinstance(weight, Tensor) or weight.dim() != 1:
            return None
        width = len(weight)
    x = _random(replica, *shape, width).requires_grad_()
    return (x, size) if takes(module, "size") else (x,)


def _first(module: Any, names: str) -> Any:
    return next((module._modules[n] for n in names.split() if n in module._modules), None)


def _random(replica: Replica, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE).normal_(generator=replica.random)
