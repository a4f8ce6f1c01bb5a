"""Which linear layers keep their weight in fewer bits, and what a decoding step reads of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.nn.linear import Linear, is_low_precision
from fastvlm.patching.rules import Swap

STORAGES = ("bf16", "int8")
LINEAR = Swap(Linear, ("linear",))


def check_weights(op: str, weights: str | None, floors: frozenset[str]) -> None:
    if weights is not None and weights not in STORAGES:
        allowed = ", ".join(map(repr, STORAGES))
        raise ValueError(f"fastvlm.{op}: weights must be None or one of {allowed}; got {weights!r}")
    if weights is not None and "linear" not in floors:
        raise ValueError(
            f"fastvlm.{op}: weights={weights!r} changes linear layers, and only leaves them out"
        )


def choose_linear(module: Any, storage: str | None) -> Swap | str:
    """The swap of a linear layer whose weight is to be kept in storage, or the reason against."""
    dtype = module.weight.dtype
    narrow = storage == "bf16" and dtype.itemsize <= 2
    if storage is None or narrow or dtype == torch.float64:
        return LINEAR
    if module.weight.is_inference():
        return "its weight was made under inference_mode, where no change of it can be noticed"
    from fastvlm.nn.low_precision import LowPrecisionLinear  # loads torch.compile: a second

    return Swap(LowPrecisionLinear, ("low_precision_linear",), (("storage", storage),))


def storage_of(swap: Swap | None) -> str | None:
    return None if swap is None else dict(swap.attributes).get("storage")


def forget_copy(module: nn.Module) -> None:
    """Let go of a linear layer's copy in fewer bits, if it can have one."""
    if is_low_precision(module):
        from fastvlm.nn.low_precision import forget

        forget(module)


def read_at_a_step(module: nn.Module, storage: str | None) -> tuple[str, tuple[int, int]]:
    """The type in which a step reads a layer's weight, and the bytes: of the weight, as stored."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return "", (0, 0)
    own = weight.numel() * weight.element_size()
    if storage == "bf16":
        return storage, (own, 2 * weight.numel())
    if storage == "int8":
        return storage, (own, weight.numel() + 4 * weight.shape[0])
    return str(weight.dtype).removeprefix("torch."), (own, own)


def adapters_of(module: nn.Module) -> list[nn.Module]:
    """The parts of an adapted layer (PEFT) that are not the layer itself."""
    base = getattr(module, "base_layer", None)
    if not isinstance(base, nn.Module):
        return []
    inside = set(base.modules())
    return [part for part in module.modules() if part not in inside]
