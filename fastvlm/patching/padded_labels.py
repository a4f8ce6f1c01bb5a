"""Labels in which padding counts: said once, and left as it is. Labels in rows that are hidden."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fastvlm.compat import pytorch

_LOOKED: WeakSet[nn.Module] = WeakSet()


def look(model: Any, labels: Any) -> None:
    """Warn, once for a model, where its first labels have padding that counts.

    labels [B, L] as `tokenizer(padding=True).input_ids` gives them: pad ids, not -100, at the end
    of a row or its beginning. On a GPU only the first call is waited for; on a CPU calls are looked
    at until one has padding.
    """
    if model in _LOOKED or type(labels) is not Tensor or labels.dim() != 2:
        return
    if labels.is_meta or pytorch.is_transformed() or pytorch.is_watched():
        return
    on_cpu = labels.device.type == "cpu"
    if not on_cpu:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        _LOOKED.add(model)
    pad, end = (_token(model.config, f"{name}_token_id") for name in ("pad", "eos"))
    if pad is None or (share := padded_share(labels, pad, end == pad)) == 0:
        return
    _LOOKED.add(model)
    warnings.warn(
        f"fastvlm: padding is trained on: {share:.0%} of the labels of this batch are the pad id "
        f"({pad}) around a row's text, and count in the loss. Mask them, "
        f"labels = labels.masked_fill(attention_mask of the labels == 0, -100), unless that is "
        "meant; nothing is changed here",
        stacklevel=3,
    )


def padded_share(labels: Tensor, pad: int, ends: bool) -> float:
    """Which share of the labels that count is padding at the end or the beginning of a row.

    ends: the pad id also ends a text; the first one of those at the end is none.
    """
    text = ((labels != pad) & (labels != -100)).long()
    pads = labels == pad
    behind = text.flip(1).cumsum(1).flip(1) == 0
    before = text.cumsum(1) == 0
    padding = (pads & (behind | before)).sum()
    if ends:
        padding = padding - (pads & behind).any(1).sum()
    counted = (labels != -100).sum()
    return float(padding / counted.clamp(min=1))


def _token(config: Any, name: str) -> int | None:
    """A special token of the targets."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for source in (text, config):
        found = getattr(source, name, None)
        if isinstance(found, int):
            return found
    return None


def hides_labels(mask: Tensor, labels: Tensor) -> bool:
    """Whether a label [B, L] may count in a row that a mask hides.

    In its own row, or one row before, as the loss of most causal models shifts it: with padding on
    the left, from the last pad. Which it is a class does not tell.
    """
    if mask.shape != labels.shape or labels.dim() != 2:
        return True  # as far as anybody can tell
    counted, hidden = labels != -100, mask == 0
    own, before = counted & hidden, counted[:, 1:] & hidden[:, :-1]
    return bool(own.any() | before.any())
