"""One MLP by its spec; its module's own forward where something in it must be called."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastvlm import ops
from fastvlm.models.spec import Mlp
from fastvlm.nn.linear import is_plain_product, is_watched, weight_of
from fastvlm.nn.mlp import computes, gelu_mlp, is_known
from fastvlm.reference.mlp import FUNCTIONS
from fastvlm.run.mixin import Mixin


class PatchedMlp(Mixin):
    """An MLP that is one op, if nobody looks into it and all of it has the dtype of its rows."""

    spec: Mlp

    def forward(self, hidden_states: Tensor) -> Tensor:
        spec = self.spec
        names = (spec.up, spec.down) if spec.gate is None else (spec.gate, spec.up, spec.down)
        parts = [getattr(self, name) for name in names]
        dropout: Any = None if spec.dropout is None else getattr(self, spec.dropout)
        p = dropout.p if dropout is not None and self.training else 0.0
        fuses = all(map(is_plain_product, parts)) and is_known(
            getattr(self, spec.act), spec.evaluated
        )
        fuses = fuses and (dropout is None or not is_watched(dropout))
        fuses = fuses and len({part.weight.dtype for part in parts}) == 1
        if fuses and spec.gate is None:
            up, down = parts
            return self._dropped(gelu_mlp(hidden_states, up, down, spec.activation, p))
        if fuses and p == 0 and _has_no_bias(parts) and not computes(parts, hidden_states):
            weights = map(weight_of, parts)
            fused: Tensor = ops.geglu_mlp(hidden_states, *weights, activation=spec.activation)
            return self._dropped(fused)
        if fuses and spec.gate is not None and dropout is not None:
            # the class may compose its activation of eight ops, each a pass over [T, F]
            gate, up, down = parts
            hidden = FUNCTIONS[spec.activation](gate(hidden_states)) * up(hidden_states)
            y: Tensor = down(dropout(hidden))
            return self._dropped(y)
        out: Tensor = super().forward(hidden_states)
        return out

    def _dropped(self, y: Tensor) -> Tensor:
        name = self.spec.out_dropout
        if name is not None:
            y = getattr(self, name)(y)
        return y


def _has_no_bias(parts: list[nn.Linear]) -> bool:
    return all(part.bias is None for part in parts)
