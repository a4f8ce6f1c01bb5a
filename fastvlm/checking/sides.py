"""A model with fastvlm and without, and transformers' own other ways to the same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastvlm.checking.keeping import configs_of
from fastvlm.compat import attentions
from fastvlm.patching.classes import is_patched, unpatched_class
from fastvlm.patching.patch import PatchError, patch
from fastvlm.patching.weights import is_approximate

SIDES = ("transformers", "fastvlm")


class Sides:
    """One model, to be run as it is without fastvlm or as it is with it.

    A model that is patched already is compared as it is: nothing of it is patched anew.

    Raises PatchError where nothing can be patched, or a patched module was wrapped since, and
    ValueError where it reads its weights in fewer bits, whose outputs are meant to differ.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        for name, module in model.named_modules():
            if not is_patched(module) and hasattr(type(module), "_fastvlm_base"):
                raise PatchError(
                    f"fastvlm.check: {name} was wrapped after patching by {type(module).__name__}; "
                    "undo that first"
                )
        if any(is_approximate(module) for module in model.modules()):
            raise ValueError(
                "fastvlm.check: model must be patched without weights= and compute=, which "
                "change its outputs on purpose (fastvlm.log_prob_change says by how much); "
                "fastvlm.patch(model) takes them back"
            )
        self.was_patched = any(is_patched(module) for module in model.modules())
        self.report = "" if self.was_patched else str(patch(model))
        self._patched = {m: type(m) for m in model.modules() if is_patched(m)}

    def choose(self, side: str) -> None:
        for module, cls in self._patched.items():
            cls = cls if side == "fastvlm" else unpatched_class(module)
            if type(module) is not cls:
                module.__class__ = cls


Way = tuple[str, Callable[[], contextlib.AbstractContextManager[Any]]]


def other_ways(model: nn.Module, seeds: int = 2) -> list[Way]:
    """How transformers computes the same in another order of sums: (name, context manager).

    Its other attention (eager where it runs sdpa, sdpa where it runs eager), and its own layers
    with the sums of their products, convolutions and norms in other orders.
    """
    now = {own[key] for own, key in _settings(model)}
    ways: list[Way] = [
        (f"{name} attention", lambda name=name: _attention(model, name))  # type: ignore[misc]
        for name in ("eager", "sdpa")
        if now and now != {name}
    ]
    return [*ways[:1], *reordered(model, seeds)]


def reordered(model: nn.Module, seeds: int, first: int = 0) -> list[Way]:
    return [
        (f"other order of sums {seed}", lambda seed=seed: _reordered(model, seed))  # type: ignore[misc]
        for seed in range(first, first + seeds)
    ]


@contextlib.contextmanager
def _reordered(model: nn.Module, seed: int) -> Iterator[None]:
    """Without gradient checkpointing, whose second run of a layer would have its own order."""
    name = "gradient_checkpointing"
    on = [vars(module) for module in model.modules() if vars(module).get(name)]
    for own in on:
        own[name] = False
    try:
        with Reordered(seed):
            yield
    finally:
        for own in on:
            own[name] = True


@contextlib.contextmanager
def _attention(model: nn.Module, name: str) -> Iterator[None]:
    """Another of transformers' attentions, for all parts of the model that have one of the two."""
    before = [(own, key, own[key]) for own, key in _settings(model)]
    for own, key, _ in before:
        own[key] = name
    try:
        yield
    finally:
        for own, key, value in before:
            own[key] = value


def _settings(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the configurations keep which attention runs, of those that name one of the two."""
    found = (attentions.attention_settings(config) for config in configs_of(model))
    return [(own, key) for own, key in filter(None, found) if own[key] in ("eager", "sdpa")]


class Reordered(TorchFunctionMode):
    """Linear layers, convolutions and LayerNorms whose sums are taken in another order.

    The same numbers in exact arithmetic, other roundings. A product's columns are summed in two
    parts, and rows come in another order, in which gradients of weights are summed.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = {F.linear: self._linear, F.layer_norm: self._layer_norm, F.conv2d: self._conv2d}
        return own.get(func, func)(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if type(weight) not in (Tensor, nn.Parameter) or weight.dim() != 2:
            return F.linear(input, weight, bias)
        rows = input.reshape(-1, input.shape[-1])
        order = self._order(rows)
        columns = self._order(weight.t())
        first, second = columns.chunk(2) if columns.numel() > 1 else (columns, columns[:0])
        rows = rows[order]
        out = F.linear(rows[:, first], weight[:, first])
        out = out + F.linear(rows[:, second], weight[:, second])
        out = out if bias is None else out + bias
        return out[order.argsort()].reshape(*input.shape[:-1], weight.shape[0])

    def _layer_norm(self, input: Tensor, shape: Any, *args: Any, **kwargs: Any) -> Tensor:
        rows = input.flatten(0, -len(shape) - 1) if input.dim() > len(shape) else input
        if rows is input:
            return F.layer_norm(input, shape, *args, **kwargs)
        order = self._order(rows)
        out = F.layer_norm(rows[order], shape, *args, **kwargs)
        return out[order.argsort()].reshape(input.shape)

    def _conv2d(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        formats = (torch.channels_last, torch.contiguous_format)
        if not input.is_contiguous():
            formats = formats[::-1]
        out = F.conv2d(input.contiguous(memory_format=formats[0]), *args, **kwargs)
        return out.contiguous(memory_format=formats[1])

    def _order(self, rows: Tensor) -> Tensor:
        """A permutation of the rows, drawn without touching anybody's random state."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(rows.shape[0], generator=generator).to(rows.device)


class Float64(TorchFunctionMode):
    """transformers in float64 to the end, also where it asks for float32 whatever it is given."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if func is Tensor.to:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **kwargs)
