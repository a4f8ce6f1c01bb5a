"""A model that is as it came after whatever is run with it, and how its dropout is switched off."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.compat import pytorch

# what a module holds in dicts of their own: their entries are put back, not the dicts
_TABLES = ("_parameters", "_buffers", "_modules")


class _Kept:
    """All that a forward, a backward pass or a patch may change of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(m, type(m), dict(vars(m))) for m in model.modules()]
        self.tables = [
            (table, dict(table)) for m, _, own in self.modules for table in _tables_of(own)
        ]
        self.configs = [(c, dict(vars(c))) for c in configs_of(model)]
        self.grads = [(p, p.grad) for p in model.parameters()]
        values = [*model.buffers(), *_renormed(model)]
        self.values = [(tensor, tensor.detach().clone()) for tensor in values]
        hooks = (pytorch.after_grad_hooks(p) for p in model.parameters())
        self.hooks = [(table, dict(table)) for table in hooks if table]

    def clear(self) -> None:
        """No gradients, and nobody who is told of new ones (an optimizer in the backward pass)."""
        for parameter, _ in self.grads:
            parameter.grad = None
        for table, _ in self.hooks:
            table.clear()

    def put_back(self) -> None:
        for module, cls, own in self.modules:
            if type(module) is not cls:
                module.__class__ = cls
            _put_back(vars(module), own)
        for table, own in (*self.tables, *((vars(c), own) for c, own in self.configs)):
            _put_back(table, own)
        for parameter, grad in self.grads:
            parameter.grad = grad
        for table, own in self.hooks:
            table.update(own)
        with torch.no_grad():
            for tensor, value in self.values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Inside the block anything may be done to a model but to write into its parameters.

    After it, also after an error: the same parameters, gradients, buffers and their values,
    modules, classes, hooks, modes, attributes and configurations, and the same random states.
    Parameters whose rows a lookup renorms (nn.Embedding's max_norm) have their values too.
    """
    state = _Kept(model)
    with _random_states():
        try:
            state.clear()
            yield
        finally:
            state.put_back()


def without_dropout(model: nn.Module) -> None:
    """Set every probability of dropping something to zero, in the modules and configurations."""
    for module in model.modules():
        own = vars(module)
        for name in [n for n in own if "drop" in n and _is_rate(own[n])]:
            setattr(module, name, 0.0)
        if pytorch.drops(module):
            vars(module)["p"] = 0.0
    for config in configs_of(model):
        own = vars(config)
        for name in [n for n in own if "drop" in n and _is_rate(own[n])]:
            own[name] = 0.0


def configs_of(model: nn.Module) -> list[Any]:
    """The configurations that the modules hold, and those inside of these, each once."""
    found: dict[int, Any] = {}
    waiting = [v for m in model.modules() for n, v in vars(m).items() if n.endswith("config")]
    while waiting:
        config = waiting.pop()
        if id(config) in found or not hasattr(config, "to_dict"):
            continue
        found[id(config)] = config
        waiting += [v for n, v in vars(config).items() if n.endswith("config")]
    return list(found.values())


def _is_rate(value: Any) -> bool:
    return isinstance(value, float) and value > 0


def _tables_of(own: dict[str, Any]) -> list[dict[Any, Any]]:
    hooks = [n for n, v in own.items() if "hooks" in n and isinstance(v, dict)]
    return [own[name] for name in (*_TABLES, *hooks) if isinstance(own.get(name), dict)]


def _put_back(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    same = list(now) == list(before) and all(now[name] is before[name] for name in before)
    if not same:
        now.clear()
        now.update(before)


def _renormed(model: nn.Module) -> list[Tensor]:
    embeddings = (m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    return [m.weight for m in embeddings if m.max_norm is not None]


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    """The states of torch, of each of its devices, of Python and of NumPy come back."""
    python, numpy = random.getstate(), _numpy_random()
    numbers = numpy.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.set_state(numbers)


def _numpy_random() -> Any:
    try:
        import numpy
    except ImportError:  # torch runs without it
        return None
    return numpy.random
