"""What a token embedding multiplies its rows with."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from fastvlm.nn.linear import original


def factor_of(module: Any) -> float | None:
    """What the rows are multiplied with, rounded as the module rounds it; None: we cannot tell."""
    base = original(type(module))
    if len(module._parameters) > 1:
        return None  # rows of its own for some tokens (T5Gemma 2: the end of an image)
    if base.forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    if "ScaledWordEmbedding" not in base.__name__ or not isinstance(scale, (int, float)):
        return None
    return _rounded(scale, module.weight.dtype)


@functools.cache
def _rounded(scale: float, dtype: torch.dtype) -> float:
    return torch.tensor(scale, dtype=dtype, device="cpu").item()
