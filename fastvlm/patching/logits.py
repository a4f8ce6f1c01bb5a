"""Logits that are computed when somebody asks for them, so that a loss need not have them.

The head of a patched model gives `LazyLogits` while its own forward, called with labels, runs. What
transformers does between head and loss (bias, softcap, float(), view) is kept in mind; its call of
``cross_entropy`` becomes `fastvlm.ops.linear_cross_entropy`. Anything else computes the logits.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm import ops
from fastvlm.compat import walks
from fastvlm.loss.request import LossRequest, Packed
from fastvlm.nn.weight_mark import WeightMark
from fastvlm.ops._autograd import autocasts
from fastvlm.patching.lazy_tensor import LazyTensor


@dataclass(frozen=True)
class State:
    """How the head was called: with gradients or not, under autocast.

    weight: the parameter, and what shows whether it has changed since; None for logits that nobody
    keeps (a decoding loop, which may run beside a training one).
    """

    grad: bool
    autocast: torch.dtype | None
    weight: tuple[Tensor, WeightMark] | None = None

    @classmethod
    def now(cls, x: Tensor, weight: Tensor | None = None) -> State:
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if autocasts(kind) else None
        marked = None if weight is None else (weight, WeightMark(weight))
        return cls(torch.is_grad_enabled(), autocast, marked)

    @contextmanager
    def restored(self, kind: str) -> Iterator[None]:
        """kind: of the device."""
        if self.weight is not None and not self.weight[1].is_current(self.weight[0]):
            raise RuntimeError(
                "fastvlm: outputs.logits must be looked at before the weights change "
                "(optimizer.step()): a patched model computes them only then"
            )
        with torch.set_grad_enabled(self.grad), ExitStack() as stack:
            if kind != "meta":
                on = self.autocast is not None
                stack.enter_context(torch.autocast(kind, self.autocast, enabled=on))
            yield


@dataclass(frozen=True, eq=False)
class LazyLogits(LazyTensor):
    """softcap * tanh((h weight^T + bias) / softcap) of the shape and dtype that a model expects.

    h: [..., d]. weight: [V, d]. bias: [V]. divided: softcap's division was asked for, its tanh or
    factor not yet. packed: what h is a padded grid of. state: see `State`.
    """

    h: Tensor
    weight: Tensor
    bias: Tensor | None
    request: LossRequest
    dtype: torch.dtype
    state: State
    divided: float | None = None
    bounded: bool = False
    softcap: float | None = None
    packed: Packed | None = None

    def tensor(self) -> Tensor:
        """RuntimeError where the weight has changed since: these would be other logits."""
        with self.state.restored(self.device.type):
            return self._computed()

    def _computed(self) -> Tensor:
        logits = ops.linear(self.h, self.weight, self.bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        elif self.divided is not None:
            logits = logits / self.divided
            logits = torch.tanh(logits) if self.bounded else logits
        return logits.to(self.dtype)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.h.shape[:-1], self.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.h.device

    def float(self) -> LazyLogits:
        return replace(self, dtype=torch.float32)

    def contiguous(self) -> LazyLogits:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1:
            return self.tensor().to(*args, **kwargs)
        if isinstance(args[0], torch.dtype):
            return replace(self, dtype=args[0])
        return self if torch.device(args[0]) == self.device else self.tensor().to(*args)

    def view(self, *shape: Any) -> Any:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if len(sizes) < 2 or sizes[-1] != self.weight.shape[0]:
            return self.tensor().view(*shape)
        return replace(self, h=self.h.reshape(*sizes[:-1], self.h.shape[-1]))

    reshape = view

    def __add__(self, other: Any) -> Any:
        vector = isinstance(other, Tensor) and other.numel() == other.shape[-1] == self.shape[-1]
        if not vector or self.bias is not None or self.divided is not None or self.softcap:
            return self.tensor() + other
        dtype = torch.promote_types(self.dtype, other.dtype)
        return replace(self, bias=other.flatten().to(self.h.dtype), dtype=dtype)

    def __truediv__(self, other: Any) -> Any:
        if not isinstance(other, (int, float)) or self.divided is not None or self.softcap:
            return self.tensor() / other
        return replace(self, divided=float(other))

    def __mul__(self, other: Any) -> Any:
        if not self.bounded or other != self.divided:
            return self.tensor() * other
        return replace(self, divided=None, bounded=False, softcap=float(other))

    def __getitem__(self, index: Any) -> Any:
        rows = isinstance(index, tuple) and len(index) == 3 and index[0] is Ellipsis
        if rows and isinstance(index[1], slice) and index[2] == slice(None):
            return replace(self, h=self.h[index], packed=None)
        return self.tensor()[index]

    def tanh(self) -> Any:
        return torch.tanh(self)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.tanh and isinstance(args[0], cls) and args[0].divided and not kwargs:
            return replace(args[0], bounded=True)
        if func is F.cross_entropy:
            loss = _cross_entropy(*args, **kwargs)
            if loss is not None:
                return loss
        return super().__torch_function__(func, types, args, kwargs)


def _cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """`torch.nn.functional.cross_entropy` of lazy logits; None where the op has no such option."""
    lazy = isinstance(input, LazyLogits) and input.h.dim() == 2 and input.divided is None
    plain = weight is None and size_average is None and reduce is None and not label_smoothing
    if not (lazy and plain and target.dim() == 1 and target.dtype == torch.int64):
        return None
    request = input.request
    groups = request.groups
    if groups is not None and target.shape[0] % groups.shape[0] == 0:
        groups = groups.repeat_interleave(target.shape[0] // groups.shape[0])
    h, packed, left_out = input.h, input.packed, None
    # without a reduction the result has a place for each row
    if packed is not None and reduction != "none" and target.shape[0] == h.shape[0]:
        h, everywhere, target = packed.rows, target, target.index_select(0, packed.index)
        groups = None if groups is None else groups.index_select(0, packed.index)
        left_out = (everywhere != ignore_index).sum() - (target != ignore_index).sum()
    found = ops.linear_cross_entropy(
        h,
        input.weight,
        target,
        bias=input.bias,
        softcap=input.softcap,
        ignore_index=ignore_index,
        reduction=reduction,
        groups=groups,
        num_groups=request.num_groups,
    )
    if groups is None:
        loss: Tensor = found  # type: ignore[assignment]
    else:
        loss, sums, request.group_tokens = found
        request.group_losses = sums.detach()
    return loss if left_out is None else _of_all(loss, left_out)


def _of_all(loss: Tensor, left_out: Tensor) -> Tensor:
    """The loss, if no label counted in a row that was left out; a device is not waited for."""
    if loss.device.type != "cpu":
        return loss.masked_fill(left_out > 0, float("nan"))
    if left_out > 0:
        raise ValueError(
            "fastvlm: labels must be -100 in rows that the decoder's mask hides, where the model's "
            f"loss_function counts them; got {int(left_out)} that are not. Let the mask show these "
            "rows, or fastvlm.unpatch(model)"
        )
    return loss


class _Lazily:
    """An output of transformers whose logits are computed at the first look.

    In training they stay lazy among items() and values() for the wrappers (data-parallel ones,
    mixed precision) that walk through them before the call is over; whoever else does gets tensors.
    Of a call with groups their losses and tokens are fields like others, which wrappers hand on.
    """

    _fastvlm_training = True

    @property
    def logits(self) -> Any:
        value = self.__dict__.get("logits")
        if isinstance(value, LazyLogits) and "_fastvlm_shown" not in self.__dict__:
            value = value.tensor()
            self["logits"] = value  # type: ignore[index]
        return value

    @logits.setter
    def logits(self, value: Any) -> None:
        self.__dict__["logits"] = value

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            return self.logits
        if key == 0:  # the loss, for which nobody needs the logits
            return next(iter(super().values()))  # type: ignore[misc]
        if isinstance(key, str):  # transformers' own walks through all items
            return OrderedDict.__getitem__(self, key)  # type: ignore[index]
        return super().__getitem__(key)  # type: ignore[misc]

    def get(self, key: Any, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def items(self) -> Any:
        if not (self._fastvlm_training and walks.is_wrappers(sys._getframe(1))):
            _ = self.logits
        return super().items()  # type: ignore[misc]

    def values(self) -> Any:
        if not (self._fastvlm_training and walks.is_wrappers(sys._getframe(1))):
            _ = self.logits
        return super().values()  # type: ignore[misc]

    def __reduce__(self) -> Any:
        _ = self.logits
        reduced: Any = super().__reduce__()
        base: Any = type(self).__mro__[2]  # this class itself has no importable name
        return (base, reduced[1][: len(fields(base))], *reduced[2:])


@cache
def _lazily(base: Any, training: bool) -> Any:
    groups: Any = ("group_losses", "group_tokens")
    attributes = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__annotations__": dict.fromkeys(groups, Tensor | None),
        "_fastvlm_training": training,
        **dict.fromkeys(groups),
    }
    cls = type(base)(base.__name__, (_Lazily, base), attributes)
    return dataclass(repr=False, eq=False)(cls)


def settled(outputs: Any, request: LossRequest | None = None, training: bool = False) -> Any:
    """A model's outputs with logits that are tensors to everyone who looks, and the losses of
    groups, where the request had some."""
    if isinstance(outputs, tuple):
        return tuple(x.tensor() if isinstance(x, LazyLogits) else x for x in outputs)
    if not isinstance(getattr(outputs, "logits", None), LazyLogits):
        return outputs
    kind: Any = type(outputs)
    values = dict(outputs.items())
    if values["logits"].packed is not None:
        values["logits"] = replace(values["logits"], packed=None)
    if request is not None:
        values |= {"group_losses": request.group_losses, "group_tokens": request.group_tokens}
    return _lazily(kind, training)(**values)


def show_lazily(outputs: Any) -> None:
    """From now on a look at outputs.logits gives them as they are, computed or not."""
    if isinstance(outputs, _Lazily):
        outputs.__dict__["_fastvlm_shown"] = True
