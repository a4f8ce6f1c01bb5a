"""One gradient for an embedding and the head that is tied to it.

PyTorch makes two of the size of the table, one of them of zeros but for the rows of a batch's
tokens, and adds them. Here both read the table through one node of their own. The head's backward
pass always comes first and leaves its gradient in that node's buffer; the embedding's adds its rows
to it there, and has none of its own. What else uses the parameter meets the sum behind that node.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm.compat import pytorch
from fastvlm.loss.request import LossRequest, loss_request
from fastvlm.models.embedding import factor_of, with_own_row
from fastvlm.nn.linear import is_plain
from fastvlm.ops._autograd import once_differentiable
from fastvlm.patching.classes import is_patched
from fastvlm.patching.rules import Swap
from fastvlm.run.mixin import Mixin


class _SharedGradient:
    """Where the head's gradient is, while one backward pass goes from the head to the table.

    The nodes of a graph hold this and nothing else: what it held of the graph would hold itself.
    """

    value: Tensor | None = None


class _Table(torch.autograd.Function):
    """The weight as it is, for the lookups and the head of one call."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shared: _SharedGradient) -> Tensor:
        ctx.shared = shared
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.shared.value = None  # autograd may take over a tensor that nobody else holds
        return grad, None


class _HeadWeight(torch.autograd.Function):
    """The table for the head; its gradient is left where the lookups find it."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, shared: _SharedGradient) -> Tensor:
        ctx.shared = shared
        return table.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.shared.value = grad
        return grad, None


def head_weight(weight: Tensor, request: LossRequest) -> Tensor:
    """The head's weight, where an embedding of this call has looked up rows of it."""
    if request.table is None or request.table[0] is not weight or not torch.is_grad_enabled():
        return weight
    _, table, shared = request.table
    found: Tensor = _HeadWeight.apply(table, shared)
    return found


class _Lookup(torch.autograd.Function):
    """Rows of table [V, d] times a factor."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, ids: Tensor, factor: float, padding: int, shared: _SharedGradient
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.factor, ctx.padding = table.shape[0], factor, padding
        ctx.shared = shared
        rows = F.embedding(ids, table)
        return rows if factor == 1 else rows.mul_(factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        grad = grad if ctx.factor == 1 else grad * ctx.factor
        head_grad = ctx.shared.value
        if head_grad is None or head_grad.dtype != grad.dtype:  # not through the loss
            dense = torch.ops.aten.embedding_dense_backward
            return dense(grad, ids, ctx.rows, ctx.padding, False), None, None, None, None
        rows, places = grad.flatten(0, -2), ids.flatten()
        if ctx.padding >= 0:
            rows = rows.masked_fill((places == ctx.padding).unsqueeze(1), 0)
        if head_grad.is_cuda:
            # in one order, unlike index_add_
            head_grad.index_put_((places,), rows, accumulate=True)
        else:
            head_grad.index_add_(0, places, rows)
        return None, None, None, None, None


# whether the last call of an embedding that trains looked rows up in a table that the head shares
_SHARED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class TiedEmbedding(Mixin):
    """A token embedding whose weight is the head's."""

    def forward(self, input: Tensor) -> Tensor:
        rows: Tensor
        if torch.compiler.is_compiling():
            rows = super().forward(input)
            return rows
        request = loss_request()
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        # on CUDA the sum of many rows of 16 bits is PyTorch's business: it adds in float32
        narrow = self.weight.is_cuda and self.weight.dtype.itemsize < 4
        shares = trains and not narrow and is_plain(self, self._fastvlm_base)
        padding = -1 if self.padding_idx is None else self.padding_idx
        if request is None and pytorch.in_backward():
            # a checkpoint computes the call again, when its request is gone
            if shares and _SHARED.get(self):
                rows = _Lookup.apply(
                    self.weight, input, factor_of(self), padding, _SharedGradient()
                )
                return with_own_row(self, input, rows)
        elif trains:
            _SHARED[self] = shares and request is not None
        if request is None or not shares:
            rows = super().forward(input)
            return rows
        if request.table is None or request.table[0] is not self.weight:
            shared = _SharedGradient()
            request.table = self.weight, _Table.apply(self.weight, shared), shared
        _, table, shared = request.table
        rows = _Lookup.apply(table, input, factor_of(self), padding, shared)
        return with_own_row(self, input, rows)


def choose(module: Any) -> Swap | str:
    """The swap of an embedding that does nothing but look rows up and scale them."""
    if is_patched(module):
        swap: Swap = type(module)._fastvlm_swap
        return swap
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return "its gradient is no plain sum of rows"
    if factor_of(module) is None:
        return f"{type(module).__name__} does not tell what it multiplies its rows with"
    return Swap(TiedEmbedding, ("one gradient with the head",))
