"""What a token embedding multiplies its rows with."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.nn.linear import original


def factor_of(module: Any) -> float | None:
    """What the rows are multiplied with, rounded as the module rounds it; None: we cannot tell."""
    base = original(type(module))
    if len(module._parameters) > 1 and own_row(module) is None:
        return None
    if base.forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    if "ScaledWordEmbedding" not in base.__name__ or not isinstance(scale, (int, float)):
        return None
    return _rounded(scale, module.weight.dtype)


def own_row(module: Any) -> tuple[int, Tensor] | None:
    """A token that has a row beside the table, not multiplied, and that row; None without one
    (T5Gemma 2: the end of an image)."""
    row = module._parameters.get("eoi_embedding")
    token = getattr(module, "eoi_token_index", None)
    if row is None or len(module._parameters) != 2 or not isinstance(token, int):
        return None
    return token, row


def with_own_row(module: Any, ids: Tensor, rows: Tensor) -> Tensor:
    """rows [..., d] of a table for ids [...], but for the token that has its own."""
    found = own_row(module)
    if found is None:
        return rows
    token, row = found
    return torch.where((ids == token).unsqueeze(-1), row.to(rows.dtype), rows)


@functools.cache
def _rounded(scale: float, dtype: torch.dtype) -> float:
    return torch.tensor(scale, dtype=dtype, device="cpu").item()
