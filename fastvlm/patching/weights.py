"""Which linear layers keep their weight in fewer bits, and what a decoding step reads of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.nn.linear import Conv2d, Linear, TransposedLinear, is_approximate, is_transposed
from fastvlm.patching.rules import Swap

STORAGES = ("bf16", "int8")
ARITHMETICS = ("int8", "bf16")
LINEAR = Swap(Linear, ("linear",))
TRANSPOSED = Swap(TransposedLinear, ("linear",))
CONV = Swap(Conv2d, ("conv2d",))


def check_weights(op: str, weights: str | None, floors: frozenset[str]) -> None:
    if weights is not None and weights not in STORAGES:
        allowed = ", ".join(map(repr, STORAGES))
        raise ValueError(f"fastvlm.{op}: weights must be None or one of {allowed}; got {weights!r}")
    if weights is not None and "linear" not in floors:
        raise ValueError(
            f"fastvlm.{op}: weights={weights!r} changes linear layers, and only leaves them out"
        )


def check_compute(op: str, compute: str | None, floors: frozenset[str]) -> None:
    if compute is not None and compute not in ARITHMETICS:
        allowed = ", ".join(map(repr, ARITHMETICS))
        wanted = f"compute must be None or one of {allowed}"
        raise ValueError(f"fastvlm.{op}: {wanted}; got {compute!r}")
    if compute is not None and "linear" not in floors:
        raise ValueError(
            f"fastvlm.{op}: compute={compute!r} changes linear layers, and only leaves them out"
        )


def choose_linear(module: Any, storage: str | None, compute: str | None = None) -> Swap | str:
    """The swap of a linear layer whose weight is to be kept in storage, and whose products of many
    rows are to be computed in some arithmetic, or the reason against."""
    dtype = module.weight.dtype
    narrow = storage == "bf16" and dtype.itemsize <= 2
    if narrow or dtype == torch.float64:
        storage = None
    if compute is not None and why_not_in(compute, module):
        compute = None
    transposed = is_transposed(module)
    if storage is None and compute is None:
        return TRANSPOSED if transposed else LINEAR
    if module.weight.is_inference():
        return "its weight was made under inference_mode, where no change of it can be noticed"
    from fastvlm.nn.compute import ComputeLinear, ComputeLowPrecisionLinear
    from fastvlm.nn.low_precision import LowPrecisionLinear, LowPrecisionTransposed

    # (these load torch.compile: a second)
    if storage is None:
        assert compute is not None
        runs_on = ("linear", ops_in(compute)[0])
        return Swap(ComputeLinear, runs_on, (("compute", compute),))
    attributes = (("storage", storage),)
    if compute is None:
        mixin = LowPrecisionTransposed if transposed else LowPrecisionLinear
        return Swap(mixin, ("low_precision_linear",), attributes)
    runs_on = ("low_precision_linear", ops_in(compute)[0])
    return Swap(ComputeLowPrecisionLinear, runs_on, (*attributes, ("compute", compute)))


def choose_conv(module: Any, compute: str | None) -> Swap:
    """The swap of a vision tower's convolution: in bfloat16, whichever arithmetic was asked for."""
    if compute is None or module.weight.is_inference() or why_not_in("bf16", module):
        return CONV
    from fastvlm.nn.compute import ComputeConv2d  # loads torch.compile: a second

    return Swap(ComputeConv2d, (*CONV.runs_on, "bf16_conv2d"), (("compute", "bf16"),))


def why_not_in(compute: str, module: Any) -> str | None:
    """Why a linear layer keeps its own arithmetic though another was asked for."""
    from fastvlm.cpu.common import DTYPES
    from fastvlm.nn.compute import unavailable

    weight, name = module.weight, {"int8": "int8", "bf16": "bfloat16"}[compute]
    if is_transposed(module):
        return f"{name} arithmetic is for weights that lie as [outputs, inputs]"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, for which PyTorch chooses the kernels"
    if weight.dtype not in DTYPES:
        wanted = f"{name} arithmetic is for float32, bfloat16 and float16"
        return f"{wanted}; its weight is {weight.dtype}"
    if weight.device.type != "cpu":
        return f"{name} arithmetic is for the CPU; its weight is on {weight.device}"
    if reason := unavailable(compute):
        return f"no {name} arithmetic here: {reason}"
    if compute == "bf16" and weight.dtype == torch.bfloat16:
        return "its weight is bfloat16, and so is its arithmetic"
    if compute == "int8" and not bool(torch.isfinite(weight).all()):
        return "its weight holds a NaN or an infinity, which int8 cannot"
    return None


def stays_as_it_is(compute: str, module: Any) -> bool:
    """Whether products of a layer alone are left out of some arithmetic, for their few inputs."""
    from fastvlm.nn.compute import has_few_inputs

    return isinstance(module, nn.Linear) and has_few_inputs(compute, module.in_features)


def ops_in(compute: str) -> tuple[str, str]:
    """The ops of a product and of an MLP of many rows in some arithmetic."""
    from fastvlm.nn.compute import rounds_rows

    kind = "bf16" if rounds_rows(compute) else "int8"
    return f"{kind}_linear", f"{kind}_gelu_mlp"


def runs_in(compute: str) -> dict[str, str]:
    """By op: what runs in its place where its layers compute many rows in some arithmetic."""
    linear, mlp = ops_in(compute)
    return {
        "gelu_mlp": mlp,
        "geglu_mlp": linear,
        "residual_gelu_mlp": mlp,
        "residual_linear": linear,
    }


def storage_of(swap: Swap | None) -> str | None:
    return None if swap is None else dict(swap.attributes).get("storage")


def compute_of(swap: Swap | None) -> str | None:
    return None if swap is None else dict(swap.attributes).get("compute")


def forget_copy(module: nn.Module) -> None:
    """Let go of a layer's copy in fewer bits, if it can have one."""
    if is_approximate(module):
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
        return storage, (own, weight.numel() + 4 * weight.shape[1 if is_transposed(module) else 0])
    return str(weight.dtype).removeprefix("torch."), (own, own)


def adapters_of(module: nn.Module) -> list[nn.Module]:
    """The parts of an adapted layer (PEFT) that are not the layer itself."""
    base = getattr(module, "base_layer", None)
    if not isinstance(base, nn.Module):
        return []
    inside = set(base.modules())
    return [part for part in module.modules() if part not in inside]
