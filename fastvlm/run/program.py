"""A decoding step written down: which op reads which rows, in order.

A step of a few rows computes for milliseconds, and two hundred modules with their hooks, checks
and caches take half as long again. Where nothing but the usual is there, a stack's step is written
down once for a cache, weights looked up, and then run: by the schemas of the ops
(`fastvlm.run.step`), or on the CPU in one call (`fastvlm.cpu.step`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastvlm.compat import pytorch
from fastvlm.models.spec import Mlp
from fastvlm.models.structure import part_of
from fastvlm.nn.linear import (
    is_low_precision,
    is_plain,
    is_plain_product,
    is_transposed,
    runs_another_forward,
)
from fastvlm.nn.mlp import is_known
from fastvlm.reference.mlp import ACTIVATIONS


class NotCompilable(Exception):
    """There is a module that must be called, so that the step cannot be written down."""


class Instruction(NamedTuple):
    """One op: results and rows are numbers of registers, each of which holds rows [R, n].

    settings: the numbers that the op takes; of `self_attention` and `merged_attention` the head
    dimension and the number of their cache come first. The weights of `linear` and `gelu_mlp` are
    as their layers keep them, the last of their settings 1 where that is [inputs, outputs]; what
    one product of `linear` gives is split evenly among the results.
    """

    op: str
    results: tuple[int, ...]
    rows: tuple[int, ...]
    tensors: tuple[Tensor | None, ...] = ()
    settings: tuple[float, ...] = ()


def has_no_hooks(*modules: Any) -> bool:
    """Whether calling these would run nothing but their forward."""
    return not pytorch.has_hooks_of_all() and not any(
        runs_another_forward(module) or pytorch.has_hooks(module, backward=False)
        for module in modules
    )


def ensure(condition: bool) -> None:
    if not condition:
        raise NotCompilable


class Program:
    """The instructions of a stack's layers. Register 0 holds the embedded tokens.

    widths: the elements of a register's rows. layers: the self-attention caches, in the order in
    which instructions number them. copied: the weights of which instructions hold copies. Each
    method adds instructions and gives their results; it raises NotCompilable where a module has to
    be called.
    """

    def __init__(self, width: int) -> None:
        self.instructions: list[Instruction] = []
        self.widths = [width]
        self.layers: list[Any] = []
        self.copied: list[Tensor] = []

    def _add(
        self,
        op: str,
        widths: list[int],
        rows: tuple[int, ...],
        tensors: tuple[Tensor | None, ...],
        settings: tuple[float, ...] = (),
    ) -> list[int]:
        results = list(range(len(self.widths), len(self.widths) + len(widths)))
        self.widths += widths
        self.instructions.append(Instruction(op, tuple(results), rows, tensors, settings))
        return results

    def linear(self, x: int, *modules: Any, parts: int = 1) -> list[int]:
        """x times the weight of each module, plus its bias; each in so many parts."""
        found = [_parts(module) for module in modules]
        self.copied += [module.weight for module in modules if is_low_precision(module)]
        transposed = _transposed(modules)
        outputs = [weight.shape[1 if transposed else 0] for weight, _, _ in found]
        widths = [width // parts for width in outputs for _ in range(parts)]
        tensors = tuple(t for part in found for t in part)
        return self._add("linear", widths, (x,), tensors, (transposed,))

    def mlp(self, x: int, holder: Any, spec: Mlp) -> int:
        """holder: the module with the parts of the MLP."""
        names = (spec.up, spec.down) if spec.gate is None else (spec.gate, spec.up, spec.down)
        parts = [part_of(holder, name) for name in names]
        dropout = None if spec.dropout is None else part_of(holder, spec.dropout)
        ensure(not isinstance(dropout, nn.Module) or has_no_hooks(dropout))
        ensure(is_known(part_of(holder, spec.act), spec.evaluated))
        number = ACTIVATIONS.index(spec.activation)
        if spec.out_dropout is not None:
            ensure(has_no_hooks(getattr(holder, spec.out_dropout)))
        if spec.gate is None and all(map(is_plain_product, parts)):
            transposed = _transposed(parts)
            tensors = tuple(t for part in parts for t in (part.weight, part.bias))
            width = tensors[2].shape[1 if transposed else 0]
            return self._add("gelu_mlp", [width], (x,), tensors, (number, transposed))[0]
        if all(map(is_plain, parts)) and all(part.bias is None for part in parts):
            weights = tuple(part.weight for part in parts)
            return self._add("geglu_mlp", [weights[2].shape[0]], (x,), weights, (number,))[0]
        pre, *up = self.linear(x, *parts[:-1])
        (hidden,) = self._add("activate", [self.widths[pre]], (pre, *up), (), (number,))
        return self.linear(hidden, parts[-1])[0]

    def residual_layer_norm(self, x: int, residual: int, norm: Any) -> int:
        ensure(is_plain(norm, nn.LayerNorm) and norm.bias is not None)
        return self._add(
            "residual_layer_norm",
            [self.widths[x]],
            (x, residual),
            (norm.weight, norm.bias),
            (norm.eps,),
        )[0]

    def layer_norm(self, x: int, norm: Any, residual: int | None = None) -> list[int]:
        """norm(x); with residual h = residual + x, and norm(h)."""
        ensure(is_plain(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None)
        rows = (x,) if residual is None else (x, residual)
        widths = [self.widths[x]] * len(rows)
        return self._add("layer_norm", widths, rows, (norm.weight, norm.bias), (norm.eps,))

    def rms_norm(
        self,
        x: int,
        weight: Tensor,
        eps: float,
        offset: float,
        residual: int | None = None,
        parts: int = 1,
        gate: Tensor | None = None,
    ) -> list[int]:
        """As `layer_norm`; of each of so many parts of x, where it is heads. With a gate
        h = residual + tanh(gate) * x."""
        rows = (x,) if residual is None else (x, residual)
        widths = [self.widths[x]] * len(rows)
        return self._add("rms_norm", widths, rows, (weight, gate), (eps, offset, parts))

    def residual_rms_norm(
        self,
        x: int,
        residual: int,
        weight: Tensor,
        *,
        eps: float,
        offset: float,
        gate: Tensor | None = None,
        next_weight: Tensor | None = None,
    ) -> list[int]:
        """h, and y with next_weight."""
        widths = [self.widths[x]] * (1 if next_weight is None else 2)
        tensors = (weight, gate, next_weight)
        return self._add("residual_rms_norm", widths, (x, residual), tensors, (eps, offset))

    def rope(self, q: int, k: int, head_dim: int, way: int = 0) -> list[int]:
        """way: which of the step's pairs of cos and sin turns them."""
        return self._add("rope", [self.widths[q], self.widths[k]], (q, k), (), (head_dim, way))

    def self_attention(
        self,
        q: int,
        k: int,
        v: int,
        attention: Any,
        layer: Any,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        position_bias: Tensor | None = None,
    ) -> int:
        """The new token of each row against the cache `layer`, to which it is appended.

        position_bias: as `fastvlm.ops.cached_attention` takes it.
        """
        # in the schemas 0 stands for no window and for no cap
        settings = (window or 0, scale, softcap or 0.0)
        number = len(self.layers)
        self.layers.append(layer)
        return self._add(
            "self_attention",
            [self.widths[q]],
            (q, k, v),
            (position_bias,),
            (attention.head_dim, number, *settings),
        )[0]

    def cross_attention(
        self, q: int, layer: Any, scale: float, softcap: float | None = None
    ) -> int:
        """The new token of each row against the image of its prompt, cached in `layer`."""
        keys = layer.at_steps()
        ensure(keys is not None)
        settings = (scale, softcap or 0.0)
        return self._add("cross_attention", [self.widths[q]], (q,), keys, settings)[0]

    def merged_attention(
        self,
        q: int,
        k: int,
        v: int,
        attention: Any,
        layer: Any,
        image: Any,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> int:
        """Both, as one softmax over the keys of the cache `layer` and of the image in `image`."""
        keys = image.at_steps()
        ensure(keys is not None)
        number = len(self.layers)
        self.layers.append(layer)
        settings = (attention.head_dim, number, window or 0, scale, softcap or 0.0)
        return self._add("merged_attention", [self.widths[q]], (q, k, v), keys, settings)[0]


def _transposed(modules: Sequence[Any]) -> bool:
    """Whether the weights of an instruction lie as [inputs, outputs]: all, or none; copies in fewer
    bits never do."""
    ways = {is_transposed(module) and not is_low_precision(module) for module in modules}
    ensure(len(ways) == 1)
    return ways.pop()


def _parts(module: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, factors of its rows (int8), and bias of a linear layer that may be bypassed."""
    if is_plain_product(module):
        return module.weight, None, module.bias
    plain = type(module.weight) is nn.Parameter if is_low_precision(module) else False
    ensure(plain and has_no_hooks(module))
    ensure(not (module.weight.is_meta or module.weight.is_inference()))
    from fastvlm.nn.low_precision import stored_copy  # loads torch.compile: a second

    return (*stored_copy(module, module.storage), module.bias)
