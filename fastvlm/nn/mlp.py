"""The decoder MLPs as modules with the parameter names of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
    from 0 as well: there are some that are clipped.
    """
    run = partial(type(act).forward, act) if isinstance(act, nn.Module) else act
    far = [-1e4, -100.0, 100.0, 1e4]
    x = torch.cat((torch.linspace(-16, 16, 257), torch.tensor(far))).double()
    try:
        with torch.no_grad():
            y = run(x.clone())  # some write into what they are given
    except (RuntimeError, TypeError):
        return None
    for name, function in FUNCTIONS.items():
        if y.shape == x.shape and torch.allclose(y, function(x), atol=1e-9):
            return name
    return None


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
    """By which an activation that was evaluated once is known again."""
    # torch.nn.GELU has two forms in one class
    form = getattr(act, "approximate", "")
    return f"{type(act).__module__}.{type(act).__qualname__} {form}"


def is_known(act: Any, kind: str) -> bool:
    """Whether an activation is of the kind that was evaluated, and nobody watches it."""
    return kind_of(act) == kind and not (isinstance(act, nn.Module) and is_watched(act))


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
