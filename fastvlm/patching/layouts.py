"""From a padded transformers batch to the Layouts that the patched attention modules read.

A patched stack (encoder or decoder) builds them once per forward pass and hands them down as one
keyword argument, which transformers' layers pass on to their attention modules. So there is no
ambient state: a block that is recomputed in backward gets the same layouts again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvlm.layout import Layout

KEYWORD = "fastvlm_layouts"


@dataclass(frozen=True)
class Layouts:
    """What an attention module needs to know of the batch.

    rows: the query rows reading themselves (training, prefill); None for a decoding step.
    cross: the query rows reading the encoder; None without one.
    visible: int32 [batch, T] for a decoding step over a padded batch: the cache row of each
        position, -1 where there is padding (`fastvlm.ops.cached_attention`).
    fused_self: False where self-attention stays with transformers, mask included (several new
        tokens on a filled cache).
    """

    rows: Layout | None = None
    cross: Layout | None = None
    visible: Tensor | None = None
    fused_self: bool = True


def wants_attentions(module: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the caller asks for attention probabilities, which no fused kernel materialises."""
    asked = kwargs.get("output_attentions")
    return bool(getattr(module.config, "output_attentions", False) if asked is None else asked)


def is_2d(mask: object) -> bool:
    """A mask this module understands: none, or [batch, length]."""
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)


def ones(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.ones(batch, length, dtype=torch.bool, device=device)


def window_needs_columns(module: Any, mask: Tensor | None) -> bool:
    """Whether a sliding window counts padded columns that packing would take out.

    Padding at either end shifts all distances alike; padding between tokens does not, and matters
    where the window is shorter than the text.
    """
    window = getattr(module.config, "sliding_window", None)
    if mask is None or window is None or window >= mask.shape[1]:
        return False
    tokens = mask != 0
    starts = tokens[:, 0].long() + (tokens[:, 1:] & ~tokens[:, :-1]).sum(1)
    return bool((starts > 1).any())


def visible_positions(mask: Tensor | None) -> Tensor | None:
    """The ancestry of `cached_attention` for rows that read their own cache row, -1 for padding."""
    if mask is None:
        return None
    rows = torch.arange(mask.shape[0], dtype=torch.int32, device=mask.device).unsqueeze(1)
    return torch.where(mask != 0, rows, -1)


def zero_padding(output: Any, layout: Layout | None) -> Any:
    """The stack's output with zeros at padded positions, where transformers leaves any value."""
    if layout is None or layout.q_padding is None or layout.q_padding.index is None:
        return output
    if isinstance(output, tuple):
        return (layout.unpack(layout.pack(output[0])), *output[1:])
    output["last_hidden_state"] = layout.unpack(layout.pack(output["last_hidden_state"]))
    return output
