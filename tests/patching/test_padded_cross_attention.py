"""Padded cross-attention: transformers' flash-attention path gets it wrong, fastvlm does not.

transformers packs queries by the *encoder's* mask (its issue 35032). What its packing makes of a
padded batch is computed here with plain attention in each packed segment, which is what the
flash-attention kernel would do with the offsets it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input, _upad_input

import fastvlm

BATCH, HEADS, DIM = 2, 2, 8


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [R, H, D] against k, v [K, H, D]."""
    scores = torch.einsum("rhd,khd->hrk", q, k) * DIM**-0.5
    return torch.einsum("hrk,khd->rhd", scores.softmax(-1), v)


def inputs(queries: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = torch.randn(BATCH, queries, HEADS, DIM)
    k, v = torch.randn(2, BATCH, 5, HEADS, DIM)
    return q, k, v, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    keep = mask.bool()
    return torch.stack([attend(q[b], k[b, keep[b]], v[b, keep[b]]) for b in range(BATCH)])


def as_transformers_packs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    length = q.shape[1]
    q, k, v, index, (cu_q, cu_k), _ = _upad_input(q, k, v, mask, length, _unpad_input)
    out = torch.zeros_like(q)
    for b in range(BATCH):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        out[rows] = attend(q[rows], k[keys], v[keys])
    return _pad_input(out, index, BATCH, length)


def test_fastvlm_is_right_where_transformers_drops_queries() -> None:
    torch.manual_seed(0)
    for queries in (3, 5):
        q, k, v, mask = inputs(queries)
        layout = fastvlm.Layout.from_padded(torch.ones(BATCH, queries), mask)
        ours = layout.unpack(
            fastvlm.ops.cross_attention(
                layout.pack(q), layout.pack_kv(k), layout.pack_kv(v), layout
            )
        )
        want = exact(q, k, v, mask)
        assert torch.allclose(ours, want, atol=1e-5)
        theirs = as_transformers_packs(q, k, v, mask)
        assert not torch.allclose(theirs, want, atol=1e-2)
        assert (theirs[1, -1] == 0).all()  # a query of the padded example, returned as zeros
