"""The decoder MLPs as modules with the parameter names of transformers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm import ops
from fastvlm.nn.linear import Linear, is_plain, is_plain_product, is_watched, weight_of
from fastvlm.reference.mlp import FUNCTIONS

GELU = {"none": "gelu", "tanh": "gelu_tanh"}  # by torch.nn.GELU's argument


def activation_of(act: Callable[[Tensor], Tensor]) -> str | None:
    """The name that the ops have for an activation, None where they have none for it.

    Decided by evaluating it, since the same function goes by many class names; not its hooks. Far
    from 0 as well: there are some that are clipped. In training too: there are some that draw.
    None for what `kind_of` does not know again.
    """
    if not kind_of(act):
        return None
    runs = [act] if not isinstance(act, nn.Module) else [_in_mode(act, t) for t in (False, True)]
    far = [-1e4, -100.0, 100.0, 1e4]
    x = torch.cat((torch.linspace(-16, 16, 257), torch.tensor(far))).double()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            found = [run(x.clone()) for run in runs]  # some write into what they are given
    except (RuntimeError, TypeError):
        return None
    for name, function in FUNCTIONS.items():
        right = function(x)
        if all(y.shape == x.shape and torch.allclose(y, right, atol=1e-9) for y in found):
            return name
    return None


def _in_mode(act: nn.Module, training: bool) -> Callable[[Tensor], Tensor]:
    """The forward of a copy of an activation in training mode, or not."""
    twin = copy.copy(act)
    twin.training = training
    return partial(type(act).forward, twin)


class GegluMLP(nn.Module):
    """down_proj(gelu(gate_proj x) * up_proj x), the MLP of Gemma-2 and T5Gemma (arXiv 2002.05202).

    State: ``gate_proj.weight``, ``up_proj.weight`` [intermediate, hidden], ``down_proj.weight``
    [hidden, intermediate]. Projections that carry an adapter or a hook are called, not bypassed.
    """

    activation: str = "gelu_tanh"
    evaluated: str = ""  # the kind of the module that computes it, where there is one

    def __init__(self, hidden_size: int, intermediate_size: int, approximate: str = "tanh"):
        super().__init__()
        self.activation = GELU[approximate]
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        act, dropout = getattr(self, "act_fn", None), getattr(self, "dropout", None)
        drops = dropout is not None and self.training and dropout.p > 0
        bias = gate.bias, up.bias, down.bias
        fuses = bias == (None, None, None) and all(map(is_plain, (gate, up, down)))
        known = act is None or is_known(act, self.evaluated)
        fuses = fuses and known and not drops and (dropout is None or not is_watched(dropout))
        if fuses and not computes((gate, up, down), x):
            return ops.geglu_mlp(x, gate.weight, up.weight, down.weight, activation=self.activation)
        hidden = gate(x)
        if act is None or known:
            hidden = FUNCTIONS[self.activation](hidden)
        else:
            hidden = act(hidden)
        hidden = hidden * up(x)
        return down(dropout(hidden) if dropout is not None else hidden)


def kind_of(act: Any) -> str:
    """By which an activation that was evaluated once is known again: its class and what it holds,
    or the name of a function.

    "" where that says too little: a lambda, a module that has parts or parameters.
    """
    if not isinstance(act, nn.Module):
        return _told(act)
    if act._modules or act._parameters or act._buffers:
        return ""
    own = ((n, v) for n, v in vars(act).items() if n[0] != "_" and n not in ("training", "forward"))
    held = {name: _told(value) for name, value in own}
    return f"{_class_of(act)} {held}" if all(held.values()) else ""


def _class_of(act: nn.Module) -> str:
    # torch.nn.GELU has two forms in one class
    return f"{type(act).__module__}.{type(act).__qualname__} {getattr(act, 'approximate', '')}"


def _told(value: Any) -> str:
    """What tells a number, a text or a function of an importable name from others; else ""."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, partial):
        inner = _told(value.func)
        return f"{inner} {value.args} {sorted(value.keywords.items())}" if inner else ""
    if isinstance(value, MethodType):
        return f"{value.__func__.__module__}.{value.__func__.__qualname__}"
    home, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    found = getattr(sys.modules.get(home or ""), name, None)
    return f"{home}.{name}" if name and found is value else ""


def is_known(act: Any, kind: str) -> bool:
    """Whether an activation is of the kind that was evaluated, and nobody watches it."""
    module = isinstance(act, nn.Module)
    if module and is_watched(act):
        return False
    if torch.compiler.is_compiling():  # what it holds would be a guard each
        return module and kind.startswith(_class_of(act) + " ")
    return kind != "" and kind_of(act) == kind


def gelu_mlp(
    x: Tensor, fc1: Any, fc2: Any, activation: str, dropout_p: float, act: Any = None
) -> Tensor:
    """fc2(dropout(activation(fc1 x))), in one op where both layers may be bypassed.

    act: what to call in its place, where it is not what it was, or has a hook.
    """
    if act is None and is_plain_product(fc1) and is_plain_product(fc2):
        if dropout_p == 0 and computes((fc1, fc2), x):
            from fastvlm.nn import compute

            return compute.mlp(x, fc1, fc2, activation)
        return ops.gelu_mlp(
            x,
            weight_of(fc1),
            fc1.bias,
            weight_of(fc2),
            fc2.bias,
            activation=activation,
            dropout_p=dropout_p,
        )
    hidden = fc1(x)
    hidden = FUNCTIONS[activation](hidden) if act is None else act(hidden)
    return fc2(F.dropout(hidden, dropout_p) if dropout_p > 0 else hidden)


def computes(layers: Sequence[Any], x: Tensor) -> bool:
    """Whether an MLP of x is computed in int8 or bfloat16: each of its layers is patched so, and
    can."""
    kinds = {getattr(layer, "compute", None) for layer in layers}
    if len(kinds) > 1 or None in kinds:
        return False
    from fastvlm.nn.compute import can  # loads torch.compile: a second

    # an inner layer meets as many rows, of another width and the same kind
    return x.shape[-1] == layers[0].in_features and all(can(layer, x) for layer in layers)


class GeluMLP(nn.Module):
    """fc2(dropout(gelu(fc1 x))), the MLP of BART and Florence-2.

    State: ``fc1.weight`` [intermediate, hidden], ``fc1.bias``, ``fc2.weight`` [hidden,
    intermediate], ``fc2.bias``. activation_dropout applies in training mode only.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        approximate: str = "none",
        activation_dropout: float = 0.0,
    ):
        super().__init__()
        self.approximate = approximate
        self.activation_dropout = activation_dropout
        self.fc1 = Linear(hidden_size, intermediate_size)
        self.fc2 = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        p = self.activation_dropout if self.training else 0.0
        return gelu_mlp(x, self.fc1, self.fc2, GELU[self.approximate], p)
