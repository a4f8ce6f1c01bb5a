"""The output head without logits, in plain PyTorch: blocks over the vocabulary.

Peak extra memory is one block of ``[rows, BLOCK]``, whatever the vocabulary (the idea of
cut-cross-entropy, arXiv 2411.09009). Rows whose label is ``ignore_index`` are left out first.
Logits are float32 (float64 for float64 inputs), never rounded to a 16-bit dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
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
        logits = _wide(h) @ _wide(weight[block]).t()
        if bias is not None:
            logits = logits + _wide(bias[block])
        slope = None
        if softcap > 0:
            t = torch.tanh(logits / softcap)
            slope, logits = 1 - t * t, softcap * t
        yield block, logits, slope


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Loss and logsumexp of each row, float32: h [T, d], weight [V, d], labels int64 [T].

    0 in both where the label is ignore_index.
    """
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    nll = h.new_zeros(h.shape[0], dtype=dtype)
    lse = h.new_zeros(h.shape[0], dtype=dtype)
    rows = (labels != ignore_index).nonzero().flatten()
    x, target = h[rows], labels[rows]
    running = h.new_full((rows.shape[0],), float("-inf"), dtype=dtype)
    picked = torch.zeros_like(running)
    for block, logits, _ in _blocks(x, weight, bias, softcap):
        running = torch.logaddexp(running, torch.logsumexp(logits, -1))
        local = target - block.start
        inside = (local >= 0) & (local < logits.shape[1])
        mine = logits.gather(1, local.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        picked = torch.where(inside, mine, picked)
    nll[rows] = running - picked
    lse[rows] = running
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
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, weight, bias, those that needs[i] asks for; logits are recomputed."""
    rows = (labels != ignore_index).nonzero().flatten()
    x, target, grad = h[rows], labels[rows], grad_nll[rows].unsqueeze(1)
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    dx = torch.zeros(x.shape, dtype=dtype, device=h.device)
    dw = torch.zeros_like(weight) if needs[1] else weight.new_empty(0)
    db = torch.zeros_like(bias) if needs[2] and bias is not None else h.new_empty(0)
    for block, logits, slope in _blocks(x, weight, bias, softcap):
        d = torch.exp(logits - lse[rows].unsqueeze(1))
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
        dh = torch.zeros_like(h)
        dh[rows] = dx.to(h.dtype)
    return dh, dw, db


def linear_topk(
    h: Tensor, weight: Tensor, k: int, bias: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [T, k] (descending), their vocabulary indices int64 [T, k], logsumexp [T].

    Float32 (float64 for float64 inputs). Equal scores come in ascending order of their index.
    """
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    lse = h.new_full((h.shape[0],), float("-inf"), dtype=dtype)
    values = h.new_empty((h.shape[0], 0), dtype=dtype)
    indices = torch.empty((h.shape[0], 0), dtype=torch.int64, device=h.device)
    for block, logits, _ in _blocks(h, weight, bias, softcap):
        lse = torch.logaddexp(lse, torch.logsumexp(logits, -1))
        top, at = _stable_topk(logits, min(k, logits.shape[1]))
        values = torch.cat((values, top), 1)
        indices = torch.cat((indices, at + block.start), 1)
        values, order = _stable_topk(values, min(k, values.shape[1]))
        indices = indices.gather(1, order)
    return values - lse.unsqueeze(1), indices, lse


def _stable_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, order = torch.sort(x, dim=1, descending=True, stable=True)
    return values[:, :k], order[:, :k]
