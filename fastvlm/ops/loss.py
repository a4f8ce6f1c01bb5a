"""The output head: cross-entropy and top-k over a large vocabulary without logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm import checks
from fastvlm.ops._autograd import autocast, needs_grad, once_differentiable, wanted
from fastvlm.ops.dispatch import define
from fastvlm.reference import loss as reference


def _stat(h: Tensor, *shape: int) -> Tensor:
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    return h.new_empty(h.shape[0], *shape, dtype=dtype)


_CROSS_ENTROPY = define(
    "linear_cross_entropy",
    "(Tensor h, Tensor weight, Tensor labels, Tensor? bias, float softcap, int ignore_index) "
    "-> (Tensor, Tensor)",
    reference.linear_cross_entropy,
    lambda h, *rest: (_stat(h), _stat(h, 2)),
)
_CROSS_ENTROPY_BACKWARD = define(
    "linear_cross_entropy_backward",
    "(Tensor grad_nll, Tensor h, Tensor weight, Tensor labels, Tensor? bias, Tensor lse, "
    "float softcap, int ignore_index, float skip_below, bool[3] needs) "
    "-> (Tensor, Tensor, Tensor)",
    reference.linear_cross_entropy_backward,
    lambda g, h, weight, labels, bias, *settings: tuple(
        h.new_empty(t.shape) if need and t is not None else h.new_empty(0)
        for t, need in zip((h, weight, bias), settings[-1])
    ),
)


def _fake_topk(h: Tensor, weight: Tensor, k: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _stat(h, k), h.new_empty((h.shape[0], k), dtype=torch.int64), _stat(h)


_TOPK = define(
    "linear_topk",
    "(Tensor h, Tensor weight, int k, Tensor? bias, float softcap) -> (Tensor, Tensor, Tensor)",
    reference.linear_topk,
    _fake_topk,
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Any,
        labels: Tensor,
        softcap: float,
        ignore_index: int,
        skip_below: float,
    ) -> Tensor:
        nll, lse = _CROSS_ENTROPY(h, weight, labels, bias, softcap, ignore_index)
        ctx.save_for_backward(h, weight, labels, bias, lse)
        ctx.settings = softcap, ignore_index, skip_below
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[:3])
        grads = _CROSS_ENTROPY_BACKWARD(grad_nll, *ctx.saved_tensors, *ctx.settings, needs)
        return (*wanted(grads, needs), None, None, None, None)


def _check(op: str, h: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.is_tensor(op, h=h, weight=weight)
    checks.is_float(op, "h", h)
    if h.dim() != 2:
        raise checks.fail(op, "h", "of shape [rows, features]", h)
    checks.has_shape(op, "weight", weight, [None, h.shape[1]])
    if bias is not None:
        checks.is_tensor(op, bias=bias)
        checks.has_shape(op, "bias", bias, [weight.shape[0]])


def _skip_below(op: str, skip: bool | float, dtype: torch.dtype) -> float:
    """0.0 stands for skipping nothing inside the schema."""
    if isinstance(skip, bool):
        return torch.finfo(dtype).eps / 32 if skip else 0.0
    if not isinstance(skip, (int, float)) or not 0.0 <= skip < 1.0:
        raise checks.fail(op, "skip_tiny_gradients", "True, False or a number in [0, 1)", skip)
    return float(skip)


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    groups: Tensor | None = None,
    num_groups: int | None = None,
    skip_tiny_gradients: bool | float = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of softcap * tanh((h weight^T + bias) / softcap); the logits never exist.

    h: [T, d]. weight: [V, d]. bias: [V] or None. labels: int64 [T], in [0, V) or ignore_index;
    rows with ignore_index cost nothing. softcap: Gemma-2's final cap (30), None for none.
    reduction: "mean" over the rows that count (NaN if none does, as PyTorch), "sum", or "none"
    ([T], 0 where ignored). groups: int64 [T], the (task, language) of each row, in
    [0, num_groups).

    Returns the loss in float32; with groups also the summed loss [num_groups] and the count of
    rows [num_groups] of each group. Gradients for h, weight and bias, each only if it wants one; a
    second derivative is refused (RuntimeError). On a CPU with AMX the logits' gradients
    are rounded to bfloat16, where h and weight are, for the products behind them. The idea:
    cut-cross-entropy, arXiv 2411.09009.

    skip_tiny_gradients lets the backward pass leave out products whose factor is tiny: of a row
    with upstream gradient g, logits other than its label's whose gradient is at most t |g|. It
    changes no loss. True stands for t = eps / 32 of the dtype of h (2^-12 in bfloat16, as in the
    paper): sixteen such terms together are half a unit in the last place of a sum of size 1. A
    number in (0, 1) is another t. What is left out of a gradient is, at most,

        of h[r]:       sum of |dlogit[r, v]| |weight[v]| <= |g[r]| min(1, t V) max |weight|
        of weight[v]:  sum of |dlogit[r, v]| |h[r]|      <= t sum of |g[r]| |h[r]|

    over the pairs (r, v) that are tiny. Kernels leave out less, whole blocks in which all pairs
    are (Triton: tiles of rows by tokens; CPU: tokens that are tiny for all rows), and the
    reference nothing. The gradient of bias is exact. It pays where the model is sure, and only
    there it does no harm: where the softmax is flat, V > 1 / t, all tokens but the labels are
    tiny. Not for the first steps of training, nor where weight has to learn of rare tokens.

    Raises TypeError or ValueError; the message names the argument. Values of labels and groups are
    not checked, which would wait for the device: a label that is neither in [0, V) nor ignore_index
    makes the loss of its row NaN, and the gradients that this row has a part in.
    """
    op = "linear_cross_entropy"
    _check(op, h, weight, bias)
    checks.is_tensor(op, labels=labels)
    checks.has_shape(op, "labels", labels, [h.shape[0]])
    if labels.dtype != torch.int64:
        raise checks.fail(op, "labels", "int64", labels)
    if labels.device != h.device:
        raise checks.fail(op, "labels", f"on the device of h ({h.device})", labels)
    checks.choice(op, "reduction", reduction, ("mean", "sum", "none"))
    cap = checks.softcap_value(op, softcap)
    if (groups is None) != (num_groups is None):
        raise checks.fail(op, "num_groups", "given together with groups", num_groups)
    if groups is not None:
        checks.is_tensor(op, groups=groups)
        checks.has_shape(op, "groups", groups, [h.shape[0]])
        if groups.dtype != torch.int64:
            raise checks.fail(op, "groups", "int64", groups)
        if groups.device != h.device:
            raise checks.fail(op, "groups", f"on the device of h ({h.device})", groups)
        if not isinstance(num_groups, int) or num_groups < 1:
            raise checks.fail(op, "num_groups", "a whole number, 1 or more", num_groups)
    h, weight, bias = autocast(h, weight, bias)
    checks.same_kind(op, "h", h, weight=weight, bias=bias)
    below = _skip_below(op, skip_tiny_gradients, h.dtype)
    if needs_grad(h, weight, bias):
        nll: Tensor = _CrossEntropy.apply(h, weight, bias, labels, cap, ignore_index, below)
    else:
        nll, _ = _CROSS_ENTROPY(h, weight, labels, bias, cap, ignore_index)
    counted = labels != ignore_index
    loss = nll
    if reduction != "none":
        loss = nll.sum()
        if reduction == "mean":
            loss = loss / counted.sum()
    if groups is None or num_groups is None:
        return loss
    sums = nll.new_zeros(num_groups).index_add(0, groups, nll)
    counts = torch.zeros(num_groups, dtype=torch.int64, device=h.device)
    return loss, sums, counts.index_add(0, groups, counted.long())


def linear_topk(
    h: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k most probable tokens of each row: the head of a decoding step, without logits.

    h: [T, d]. weight: [V, d]. bias: [V] or None. 1 <= k <= V. softcap: as in
    `linear_cross_entropy`.

    Returns log-probabilities float32 [T, k] (descending), vocabulary indices int64 [T, k] (equal
    scores in ascending order) and logsumexp float32 [T]. It has no gradient.

    Raises TypeError or ValueError; the message names the argument. RuntimeError where an input
    wants a gradient and gradients are on.
    """
    op = "linear_topk"
    _check(op, h, weight, bias)
    if not isinstance(k, int) or not 1 <= k <= weight.shape[0]:
        raise checks.fail(op, "k", f"in [1, {weight.shape[0]}] (the vocabulary)", k)
    cap = checks.softcap_value(op, softcap)
    if needs_grad(h, weight, bias):
        raise RuntimeError(
            "fastvlm.linear_topk has no gradient: call it under torch.no_grad(), or use "
            "linear_cross_entropy to train"
        )
    h, weight, bias = autocast(h, weight, bias)
    checks.same_kind(op, "h", h, weight=weight, bias=bias)
    return _TOPK(h, weight, k, bias, cap)
