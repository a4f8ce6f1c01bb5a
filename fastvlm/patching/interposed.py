"""What stands between a stack and its parts: hooks, wrappers, forwards and attention of others.

A patched stack packs its rows and gives its attention layouts in place of masks. Whoever looks at a
part, or takes its place, must find what would be there without fastvlm. So the stack is looked at
when it is patched, and again before each call that fills no cache or begins one: a hook on an
embedding keeps the padded grid, and anything else that no table here calls harmless makes
transformers' own attention run, masks and padding included.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fastvlm.compat import pytorch
from fastvlm.models.spec import Stack
from fastvlm.models.structure import (
    attention_in,
    hands_down,
    layer_in,
    layers_and_owner,
    layers_of,
    part_of,
    submodule,
)
from fastvlm.nn.linear import original
from fastvlm.patching.agreed import disagreed, said
from fastvlm.patching.foreign import (
    attention_of_others,
    foreign_hook,
    is_of,
    named_functions,
    own_forward,
    replaced_in_class,
)

# whose modules see each row by itself, or hand everything on
_HARMLESS_HOMES = (
    "torch.nn",
    "torch.distributed",
    "torch._dynamo",
    "transformers",
    "fastvlm",
    "peft",
    "bitsandbytes",
    "torchao",
)
# called before the first layer: padding there holds what it holds without fastvlm
_EMBEDDINGS = (
    "embed_tokens", "embed_positions", "layernorm_embedding", "rotary_emb", "conv1", "conv2",
    "embeddings", "wte", "wpe",
)  # fmt: skip
# read by our layers, which call them only where they must (`fastvlm.nn.mlp`)
_ACTIVATIONS = ("activation_fn", "act_fn", "act", "intermediate_act_fn")


class Interposed(NamedTuple):
    """What one stack cannot do, and why; None where nothing is in the way.

    unfused: run its attention on layouts. padded: run on the tokens alone.
    """

    unfused: str | None = None
    padded: str | None = None


NOTHING = Interposed()


class Part(NamedTuple):
    """An attention in a stack. layer: the number of its layer; which: of the names of its kind."""

    path: str
    module: Any
    layer: int
    which: int


def parts_of(stack: Any, spec: Stack) -> list[Part] | str:
    """The attentions in the layers of a stack, or why it has others. Sees through wrappers."""
    found = []
    for index, outer in enumerate(layers_of(stack)):
        kinds = list(enumerate(spec.attentions))
        if spec.interleaved:
            kinds = [each for each in kinds if layer_in(outer, each[1]) is not None][:1]
        layer = layer_in(outer, kinds[0][1]) if kinds else None
        if layer is None:
            return f"its layer {index} ({type(outer).__name__}) has no {spec.attentions[0]}"
        for which, name in kinds:
            part = submodule(layer, name)
            inner = None if part is None else attention_in(part)
            if inner is None:
                return f"its layers.{index}.{name} is no attention that fastvlm knows"
            for wrapper in (*_around(outer, layer), *_around(part, inner)):
                if not hands_down(wrapper):
                    kind = type(wrapper).__name__
                    return f"{kind} in its layer {index} hands no keyword arguments down"
            found.append(Part(f"layers.{index}.{name}", inner, index, which))
    return found


def layer_of(outer: Any, spec: Stack) -> Any:
    """The layer in wrappers of a single child, by any of its attentions; None without one."""
    found = (layer_in(outer, name) for name in spec.attentions)
    return next((layer for layer in found if layer is not None), None)


def _in_front_of_head(stack: Any, spec: Stack) -> Iterator[tuple[str, Any]]:
    """The modules in a stack and their paths, but for a head in it: that is called as ever."""
    for path, module in stack.named_modules():
        if module is not stack and path.partition(".")[0] != spec.head:
            yield path, module


def _around(outer: Any, inner: Any) -> list[Any]:
    """The wrappers from outer to inner, without inner."""
    found = []
    while outer is not inner:
        found.append(outer)
        (outer,) = outer._modules.values()
    return found


def configs_of(stack: Any, spec: Stack) -> list[Any]:
    """The configs by which a stack and its attentions choose an implementation."""
    parts = parts_of(stack, spec)
    modules = [stack] if isinstance(parts, str) else [stack, *(part.module for part in parts)]
    configs = [getattr(module, "config", None) for module in modules]
    return list({id(config): config for config in configs if config is not None}.values())


def without_kernel(stack: Any, spec: Any) -> str | None:
    """Why the attention of a stack is faster as transformers computes it; None where it is not."""
    if spec.on_cpu is None:
        return None
    device = part_of(stack, spec.embedding.tokens).weight.device.type
    if device in ("cpu", "meta"):
        return None
    return f"{spec.on_cpu}, for which there is no kernel on {device} yet"


def runs_ours(module: Any) -> bool:
    """Whether a module is patched, and its class, or one made of it, still runs our forward."""
    cls = type(module)
    ours = getattr(cls, "_fastvlm_class", None)
    return ours is not None and cls.forward is ours.forward


def look(stack: Any, spec: Stack, is_ours: Callable[[Any], bool]) -> Interposed:
    """What stands in the way in a stack. is_ours: whether a module is patched, or is to be."""
    attentions = parts_of(stack, spec)
    if isinstance(attentions, str):
        return Interposed(attentions)
    reason = replaced_in_class(original(type(stack))) or disagreed(stack, spec, attentions)
    if reason is not None:
        return Interposed(reason)
    for path, module, *_ in attentions:
        if not is_ours(module):
            kind = type(module).__name__
            return Interposed(f"its {path} ({kind}) is no attention that fastvlm knows")
    outers, owner = layers_and_owner(stack)
    layers = {layer_of(layer, spec) for layer in outers}
    by_layers = spec.hands is not None or spec.by_layers
    if by_layers and not all(map(is_ours, layers)):
        return Interposed(
            "it hands only to layers of fastvlm what attention reads instead of masks"
        )
    held = {submodule(layer, path) for layer in layers for path in spec.holders}
    known = layers | held | {owner, stack._modules.get(spec.embedding.holder)}
    padded = None
    for path, module in _in_front_of_head(stack, spec):
        top = path.partition(".")[0]
        reason = _of_part(path, module, is_ours(module) or module in known, is_ours)
        if reason is None:
            continue
        if top not in _EMBEDDINGS:
            return Interposed(reason)
        padded = padded or reason
    return Interposed(None, padded)


def _of_part(path: str, module: Any, known: bool, is_ours: Callable[[Any], bool]) -> str | None:
    hook = foreign_hook(module)
    if hook is not None:
        return f"there is a hook on {path} ({hook})"
    reason = own_forward(module)
    if reason is not None:
        return f"{path}: {reason}"
    cls = type(module)
    if is_ours(module):
        return replaced_in_class(original(cls))
    if known or path.rsplit(".", 1)[-1] in _ACTIVATIONS:
        return None
    if not any(is_of(cls.__module__, home) for home in _HARMLESS_HOMES) or is_of(
        cls.__module__, "torch.nn.quantized"
    ):
        return f"{path} is a {cls.__module__}.{cls.__name__}, which fastvlm does not know"
    return None


class _State(NamedTuple):
    """All of a module by which a later look could come out differently."""

    module: Any
    cls: Any
    forward: Any
    inner: Any
    children: tuple[Any, ...]
    hooks: tuple[Any, ...]

    @classmethod
    def of(cls, module: Any) -> _State:
        own = vars(module)
        return cls(
            module,
            type(module),
            own.get("forward"),
            own.get("_old_forward"),
            tuple(own["_modules"].values()),
            pytorch.hooks_of(module),
        )

    def holds(self, module: Any) -> bool:
        own = vars(module)
        return (
            type(module) is self.cls
            and own.get("forward") is self.forward
            and own.get("_old_forward") is self.inner
            and tuple(own["_modules"].values()) == self.children
            and pytorch.hooks_of(module) == self.hooks
        )


class _Look:
    """What was found in a stack, and all that it was found by. It lies in the stack's own dict, so
    that the two go together; a copy of the stack does not take it for its own."""

    def __init__(self, stack: Any) -> None:
        self.stack = weakref.ref(stack)
        self.found = look(stack, stack.spec, runs_ours)
        parts = parts_of(stack, stack.spec)
        self.attentions = [] if isinstance(parts, str) else parts
        self.layers = [layer_of(layer, stack.spec) for layer in layers_of(stack)]
        self.own = _State.of(stack)._replace(module=None)
        self.states = [_State.of(m) for _, m in _in_front_of_head(stack, stack.spec)]
        bases = {original(state.cls) for state in self.states if runs_ours(state.module)}
        bases.add(original(type(stack)))
        self.forwards = [(base, base.forward) for base in bases]
        self.functions = [each for base in bases for each in named_functions(base)]
        self.configs = configs_of(stack, stack.spec)
        self.said = said(stack, self.attentions)
        self.last = self.found  # with what lies outside of the stack

    def is_of(self, stack: Any) -> bool:
        return self.stack() is stack

    def holds(self, stack: Any) -> bool:
        return (
            self.is_of(stack)
            and self.own.holds(stack)
            and all(base.forward is forward for base, forward in self.forwards)
            and all(names.get(name) is found for names, name, found in self.functions)
            and said(stack, self.attentions) == self.said
            and all(state.holds(state.module) for state in self.states)
        )


_LOOK = "_fastvlm_look"
_told: set[tuple[Any, str]] = set()


def forget(module: nn.Module) -> None:
    """Let go of what was found in a stack."""
    vars(module).pop(_LOOK, None)


def without_look(own: dict[str, Any]) -> dict[str, Any]:
    """The dict of a module as it is copied and saved."""
    return {name: value for name, value in own.items() if name != _LOOK}


@torch.compiler.assume_constant_result  # what Dynamo takes for False
def _exports_to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def interposed(stack: Any) -> Interposed:
    """What stands in the way in a patched stack now; says so once.

    An exported program is for batches of other sizes and masks than the one it is made with.
    """
    if torch.compiler.is_exporting():
        if _exports_to_onnx():
            raise RuntimeError(
                "fastvlm: torch.onnx.export knows none of fastvlm's ops; call "
                "fastvlm.unpatch(model) first"
            )
        return Interposed("torch.export")
    return _looked_at(stack)


@torch.compiler.disable  # what it looks at is no part of a graph
def _looked_at(stack: Any) -> Interposed:
    known = vars(stack).get(_LOOK)
    if known is None or not known.holds(stack):
        known = vars(stack)[_LOOK] = _Look(stack)
    found: Interposed = known.found
    if found.unfused is None:
        reason = attention_of_others(known.configs) or without_kernel(stack, stack.spec)
        if reason is None and pytorch.has_hooks_of_all():
            reason = "there is a hook of all modules"
        if reason is not None:
            found = Interposed(reason)
    for reason, instead in zip(found, ("as transformers computes it", "on the padded batch")):
        if reason is not None and (type(stack), reason) not in _told:
            _told.add((type(stack), reason))
            warnings.warn(f"fastvlm: {type(stack).__name__} runs {instead}: {reason}", stacklevel=4)
    known.last = found
    return found


def interposed_at_last(stack: Any) -> Interposed:
    """The same for a call that may be one graph, where padding stays and hooks are called as ever.

    Then it is what the last call found that was not compiled, and the name of the attention, which
    the graph is guarded by. An implementation replaced under its name since then goes unseen.
    """
    if not torch.compiler.is_compiling():
        return interposed(stack)
    if (reason := attention_of_others([stack.config])) is not None:
        return Interposed(reason)
    known: _Look | None = getattr(stack, _LOOK, None)
    return NOTHING if known is None else known.last


def check_taken(stack: Any, marks: Any, cross: bool) -> None:
    """Refuse what a stack computed if one of its attentions never saw the layouts: it had no mask.

    marks: of the call's `Layouts`. cross: whether its cross-attentions were called. A layer that
    was left out (LayerDrop, an early exit) has nothing to say. RuntimeError names the attention.
    """
    known: _Look | None = vars(stack).get(_LOOK)
    if marks.unknown or known is None or not known.is_of(stack):
        return
    called = [part for part in known.attentions if cross or part.which == 0]
    if len(marks.attentions) == len(called):
        return
    skips = stack.training and getattr(stack, "layerdrop", 0) > 0
    count = getattr(stack.config, "num_hidden_layers", len(known.layers))
    for path, module, index, _ in called:
        layer = known.layers[index]
        runs = id(layer) in marks.layers if runs_ours(layer) else not skips and index < count
        if runs and id(module) not in marks.attentions:
            raise RuntimeError(
                f"fastvlm: {path} of {type(stack).__name__} ran without the layouts that its stack "
                "hands down in place of masks, so its result would be wrong: something between "
                "them drops keyword arguments, or calls another module; fastvlm.unpatch(model) "
                "runs it"
            )
