"""The activations of the MLP ops: their names outside, their numbers in the schemas."""

from __future__ import annotations

from fastvlm import checks
from fastvlm.reference.mlp import ACTIVATIONS

# by the older argument, that of torch.nn.GELU
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def number_of(op: str, activation: str, approximate: str | None, default: str) -> int:
    """The number of an activation, which may be given by its older name. default: of the op."""
    checks.choice(op, "activation", activation, ACTIVATIONS)
    if approximate is not None:
        checks.choice(op, "approximate", approximate, tuple(_GELU))
        named = _GELU[approximate]
        if activation not in (default, named):
            wanted = f"left out, or agree with activation={activation!r}"
            raise checks.fail(op, "approximate", wanted, approximate)
        activation = named
    return ACTIVATIONS.index(activation)
