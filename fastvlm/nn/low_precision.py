"""Linear layers that compute with a copy of their weight in fewer bits, for decoding.

A decoding step of a few rows is as fast as its weights come from memory. The copies live beside
the modules, not in them: parameters, state_dict, pickle and deepcopy know nothing of them.

Import it where it is needed only: torch.compiler.disable takes a second to load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from fastvlm import ops
from fastvlm.compat import pytorch
from fastvlm.cpu import pages
from fastvlm.nn.linear import DENSE, Linear, TransposedLinear, is_transposed, weight_of
from fastvlm.nn.weight_mark import WeightMark
from fastvlm.ops._autograd import needs_grad


class _Copy:
    """A weight in fewer bits, and what shows whether the weight still holds the same values."""

    weight: Tensor
    scale: Tensor | None

    def __init__(self, weight: Tensor, rows: Tensor, storage: str):
        """rows: the weight as [outputs, inputs], itself or a view of it."""
        # a tensor made under inference_mode could not be used outside of it
        with torch.inference_mode(False), torch.no_grad():
            if storage == "bf16":
                self.weight, self.scale = rows.detach().to(torch.bfloat16).contiguous(), None
            else:
                self.weight, self.scale = ops.quantize_rows(rows.detach().contiguous())
            pages.gather([self.weight])
            self._mark = WeightMark(weight)

    def is_fresh(self, weight: Tensor) -> bool:
        """Whether the weight is as it was, as far as a `WeightMark` can tell."""
        return self._mark.is_current(weight)


_Key = tuple[object, ...]
_copies: WeakKeyDictionary[nn.Module, dict[str, tuple[_Key, _Copy]]] = WeakKeyDictionary()
# modules whose weights are tied share one copy
_shared: WeakValueDictionary[_Key, _Copy] = WeakValueDictionary()


@torch.compiler.disable
def stored_copy(module: nn.Module, storage: str) -> tuple[Tensor, Tensor | None]:
    """The weight of a linear layer in fewer bits, and the factors of its rows; never a stale one.

    Made at the first call, and again once the weight has changed.
    """
    weight = cast(Tensor, module.weight)
    place = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight.device
    key = storage, is_transposed(module), pytorch.version_of(weight), *place
    of_module = _copies.setdefault(module, {})
    known, copy = of_module.get(storage, (None, None))
    if copy is None or known != key or not copy.is_fresh(weight):
        copy = _shared.get(key)
        if copy is None or not copy.is_fresh(weight):
            of_module.pop(storage, None)  # before the new one takes its memory
            copy = _shared[key] = _Copy(weight, weight_of(module), storage)
        of_module[storage] = key, copy
    return copy.weight, copy.scale


def forget(module: nn.Module) -> None:
    """Let go of a module's copies."""
    _copies.pop(module, None)


def _multiplied(layer: Any, input: Tensor, whole: Callable[[Tensor], Tensor]) -> Tensor:
    """whole: the product with the weight as it is."""
    weight, bias = layer.weight, layer.bias
    usual = type(input) in DENSE and type(weight) is nn.Parameter
    if not usual or weight.is_meta or weight.is_inference():
        # a kind of tensor that PyTorch dispatches, or one whose changes cannot be told
        return whole(input)
    if needs_grad(input, weight, bias):
        raise RuntimeError(
            f'fastvlm.patch: a model patched with weights="{layer.storage}" is for decoding: '
            "call it under torch.inference_mode() or torch.no_grad(); to train, patch it "
            "without weights"
        )
    stored, scale = stored_copy(layer, layer.storage)
    return ops.low_precision_linear(input, stored, scale, bias)


class LowPrecisionLinear(Linear):
    """A linear layer that computes with its weight in bfloat16 or int8; the parameter stays.

    storage: "bf16", or "int8" with one factor for each row. Arithmetic is float32. For inference:
    raises RuntimeError where a gradient is wanted.
    """

    storage = "bf16"

    def forward(self, input: Tensor) -> Tensor:
        return _multiplied(self, input, super().forward)


class LowPrecisionTransposed(TransposedLinear):
    """The same for a layer whose weight is [inputs, outputs]; the rows are those of its outputs."""

    storage = "bf16"

    def forward(self, input: Tensor) -> Tensor:
        return _multiplied(self, input, super().forward)
