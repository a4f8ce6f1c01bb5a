"""The output head without logits, in plain PyTorch: blocks over the vocabulary.

Peak extra memory is one block of ``[rows, BLOCK]``, whatever the vocabulary (the idea of
cut-cross-entropy, arXiv 2411.09009). Rows whose label is ``ignore_index`` are left out first.
Logits are float32 (float64 for float64 inputs), never rounded to a 16-bit dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 8192


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _blocks(
    h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Slices of the vocabulary, their (capped) logits in wide precision, and the cap's slope."""
    for start in range(0, weight.shape[0], BLOCK):
        block = slice(start, min(start + BLOCK, weight.shape[0]))
        logits = F.linear(
            _wide(h), _wide(weight[block]), None if bias is None else _wide(bias[block])
        )
        slope = None
        if softcap > 0:
            t = torch.tanh(logits / softcap)
            slope, logits = 1 - t * t, softcap * t
        yield block, logits, slope


class _Normalizer:
    """logsumexp of rows that come in blocks, as its two parts.

    The largest logit and the log of the sum that is left are of different sizes. Added up and
    rounded, the small one loses its digits: at a logsumexp of 40 a probability is off by 2e-6.
    """

    def __init__(self, rows: Tensor, dtype: torch.dtype):
        self.largest = rows.new_full((rows.shape[0],), float("-inf"), dtype=dtype)
        self.sum = torch.zeros_like(self.largest)

    def add(self, logits: Tensor) -> None:
        largest = torch.maximum(self.largest, logits.amax(-1))
        base = largest.masked_fill(largest.isneginf(), 0)  # nothing but -inf so far
        rescaled = self.sum * torch.exp(self.largest - base)
        self.sum = rescaled + torch.exp(logits - base.unsqueeze(1)).sum(-1)
        self.largest = largest

    def parts(self) -> Tensor:
        """[T, 2]: the largest logit, and log(sum(exp(logit - largest)))."""
        return torch.stack((self.largest, self.sum.log()), 1)


def _log_probabilities(logits: Tensor, parts: Tensor) -> Tensor:
    return (logits - parts[:, :1]) - parts[:, 1:]


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Loss [T] and the two parts of logsumexp [T, 2] (`_Normalizer`), float32, of each row.

    h [T, d], weight [V, d], labels int64 [T]. 0 in both where the label is ignore_index, NaN where
    it is another number outside of [0, V).
    """
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    nll = h.new_zeros(h.shape[0], dtype=dtype)
    lse = h.new_zeros((h.shape[0], 2), dtype=dtype)
    rows = (labels != ignore_index).nonzero().flatten()
    x, target = h[rows], labels[rows]
    running = _Normalizer(x, dtype)
    picked = x.new_zeros(rows.shape[0], dtype=dtype)
    for block, logits, _ in _blocks(x, weight, bias, softcap):
        running.add(logits)
        local = target - block.start
        inside = (local >= 0) & (local < logits.shape[1])
        mine = logits.gather(1, local.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        picked = torch.where(inside, mine, picked)
    parts = running.parts()
    outside = (target < 0) | (target >= weight.shape[0])
    parts.masked_fill_(outside.unsqueeze(1), float("nan"))  # and with them the gradients
    nll[rows] = -_log_probabilities(picked.unsqueeze(1), parts).squeeze(1)
    lse[rows] = parts
    return nll, lse


def linear_cross_entropy_backward(
    grad_nll: Tensor,
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    softcap: float,
    ignore_index: int,
    skip_below: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, weight, bias, those that needs[i] asks for; logits are recomputed.

    Exact, whatever skip_below: it is a permission, whose bound `ops.linear_cross_entropy` states.
    """
    rows = (labels != ignore_index).nonzero().flatten()
    x, target, grad = h[rows], labels[rows], grad_nll[rows].unsqueeze(1)
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    parts = lse[rows]
    dx = torch.zeros(x.shape, dtype=dtype, device=h.device)
    dw = weight.new_zeros(weight.shape) if needs[1] else weight.new_empty(0)
    db = torch.zeros_like(bias) if needs[2] and bias is not None else h.new_empty(0)
    for block, logits, slope in _blocks(x, weight, bias, softcap):
        d = torch.exp(_log_probabilities(logits, parts))
        local = (target - block.start).unsqueeze(1)
        inside = (local >= 0) & (local < logits.shape[1])
        one_hot = local.clamp(0, logits.shape[1] - 1)
        d.scatter_add_(1, one_hot, -inside.to(d.dtype))
        d = d * grad
        if slope is not None:
            d = d * slope
        if needs[0]:
            dx += d @ _wide(weight[block])
        if needs[1]:
            dw[block] = (d.t() @ _wide(x)).to(weight.dtype)
        if needs[2] and bias is not None:
            db[block] = d.sum(0).to(bias.dtype)
    dh = h.new_empty(0)
    if needs[0]:
        dh = h.new_zeros(h.shape)
        dh[rows] = dx.to(h.dtype)
    return dh, dw, db


def linear_topk(
    h: Tensor, weight: Tensor, k: int, bias: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [T, k] (descending), their vocabulary indices int64 [T, k], logsumexp [T].

    Float32 (float64 for float64 inputs). Equal scores come in ascending order of their index.
    """
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    running = _Normalizer(h, dtype)
    values = h.new_empty((h.shape[0], 0), dtype=dtype)
    indices = torch.empty((h.shape[0], 0), dtype=torch.int64, device=h.device)
    for block, logits, _ in _blocks(h, weight, bias, softcap):
        running.add(logits)
        top, at = _stable_topk(logits, min(k, logits.shape[1]))
        values = torch.cat((values, top), 1)
        indices = torch.cat((indices, at + block.start), 1)
        values, order = _stable_topk(values, min(k, values.shape[1]))
        indices = indices.gather(1, order)
    parts = running.parts()
    return _log_probabilities(values, parts), indices, parts.sum(1)


def _stable_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, order = torch.sort(x, dim=1, descending=True, stable=True)
    return values[:, :k], order[:, :k]
