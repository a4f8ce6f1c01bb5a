"""The linear projection as a module, and the question whether a module may be bypassed."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm import ops
from fastvlm.compat import hf, pytorch
from fastvlm.ops._autograd import needs_grad

DENSE = (Tensor, nn.Parameter)


class Linear(nn.Linear):
    """`torch.nn.Linear` over `fastvlm.ops.linear`: same parameters, same results.

    A few rows (a decoding step) stream the weight once; more, with gradients too, go through the
    library whose product is the fastest here.
    """

    storage: str | None = None  # what a subclass keeps its weight in, where not as it is
    compute: str | None = (
        None  # in what arithmetic a subclass computes many rows, where not its own
    )

    def forward(self, input: Tensor) -> Tensor:
        if type(input) not in DENSE or type(self.weight) not in DENSE:
            return super().forward(input)  # a DTensor, or another kind that PyTorch dispatches
        return ops.linear(input, self.weight, self.bias)


class TransposedLinear(nn.Module):
    """For transformers' Conv1D, whose weight is [inputs, outputs]: the same over
    `fastvlm.ops.linear` where no gradient is wanted, which reads the weight as it lies."""

    storage: str | None = None
    compute: str | None = None
    weight: Tensor
    bias: Tensor

    def forward(self, input: Tensor) -> Tensor:
        dense = type(input) in DENSE and type(self.weight) in DENSE
        if not dense or needs_grad(input, self.weight, self.bias):
            theirs: Callable[[Tensor], Tensor] = super().forward
            return theirs(input)
        return ops.linear(input, self.weight.t(), self.bias)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with the same parameters and results, whose channels lie together.

    On a CPU PyTorch's library is up to six times as fast so where there are few channels, and what
    follows, a norm over the channels, need not copy its map.
    """

    compute: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, H, W] -> [B, C', H', W']."""
        if type(input) in DENSE and _lies_anyhow(input):
            input = input.contiguous(memory_format=torch.channels_last)
        return super().forward(input)


def _lies_anyhow(x: Tensor) -> bool:
    """Whether x is a batch of maps on a CPU whose channels may be put together: no transform of
    PyTorch's is at work, which know one layout only."""
    if x.dim() != 4 or x.device.type != "cpu" or x.layout is not torch.strided:
        return False
    if not torch.compiler.is_compiling() and pytorch.is_transformed():
        return False
    return x.dtype in (torch.float32, torch.bfloat16)


def original(cls: type) -> Any:
    """The class that a patched one stands for; cls where it is none, or a subclass of one.

    Not by ``vars(cls)``: torch.compile breaks its graph there once a cache has changed a dict.
    """
    if getattr(cls, "_fastvlm_class", None) is not cls:
        return cls
    return cls._fastvlm_base


def runs_another_forward(module: nn.Module) -> bool:
    """Whether a forward set on the instance takes the place of its class's.

    Accelerate leaves the class's own there when it takes its hooks away.
    """
    forward = vars(module).get("forward")
    if forward is None:
        return False
    bound = isinstance(forward, MethodType) and forward.__self__ is module
    return not (bound and forward.__func__ is type(module).forward)


def is_watched(module: nn.Module) -> bool:
    """Whether a call of module runs more than its class's forward: a hook, a forward of its own."""
    return runs_another_forward(module) or pytorch.has_hooks(module)


def is_plain(module: object, *kinds: type[nn.Module]) -> bool:
    """Whether a fused kernel may read module.weight and module.bias instead of calling it.

    kinds: the exact classes that qualify (default: the linear layers). False for an adapter
    (PEFT), a quantized or parametrized layer, a hook (of all modules, too), a forward set on the
    instance, a DTensor, or where the module computes with a copy of its weight in fewer bits: then
    it must be called.
    """
    cls = type(module)
    if getattr(cls, "storage", None) is not None:
        return False
    if original(cls) not in (kinds or (nn.Linear, Linear)) or not is_bare(module):
        return False
    return type(module.weight) is nn.Parameter  # type: ignore[attr-defined]


def is_transposed(module: object) -> bool:
    """Whether a linear layer keeps its weight as [inputs, outputs] (GPT-2's)."""
    return hf.is_conv1d(original(type(module)))


def is_plain_product(module: object) -> bool:
    """`is_plain` for a linear layer either way, whose weight `weight_of` gives."""
    if not is_transposed(module):
        return is_plain(module)
    if getattr(type(module), "storage", None) is not None:
        return False
    return is_bare(module) and type(module.weight) is nn.Parameter  # type: ignore[attr-defined]


def weight_of(module: Any) -> Tensor:
    """The weight of such a layer or a convolution, [outputs, inputs]: itself, or a view of it; the
    inputs of a convolution are [height, width, channels]."""
    weight: Tensor = module.weight
    if weight.dim() == 4:
        return weight.permute(0, 2, 3, 1).flatten(1)
    return weight.t() if is_transposed(module) else weight


def inputs_of(module: Any) -> int:
    """The width of the rows that a linear layer takes, either way."""
    return int(module.weight.shape[0 if is_transposed(module) else 1])


def is_bare(module: object) -> bool:
    """Whether nobody listens at a module's call: no hook, also of all modules, and no forward of
    the instance's own (an offloader sets one)."""
    return not is_watched(module) and not pytorch.has_hooks_of_all()  # type: ignore[arg-type]


def is_low_precision(module: nn.Module) -> bool:
    """Whether a linear layer computes with a copy of its weight in fewer bits."""
    return isinstance(module, (Linear, TransposedLinear)) and module.storage is not None


def is_approximate(module: nn.Module) -> bool:
    """The same, or with its own weight in arithmetic of fewer bits (a convolution, too)."""
    kinds = (Linear, TransposedLinear, Conv2d)
    return is_low_precision(module) or (isinstance(module, kinds) and module.compute is not None)
