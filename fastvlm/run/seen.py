"""Which keys of an image the rows of a text see, where a mask says so for each row (Mllama).

Neighbouring rows that see the same keys are one query segment. Where not all keys are seen, what a
segment sees is gathered from the keys of all: once in a prefill, once for all steps of a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvlm.layout import Layout, Padding


class Seen(NamedTuple):
    """Of one call. layout: the rows, and the keys that they see. keys: int64, which these are among
    all; None where they are all. whole: the rows, and all keys of their images."""

    layout: Layout
    keys: Tensor | None
    whole: Layout


def visible_keys(mask: Tensor) -> Tensor | None:
    """What transformers adds to the scores [B, 1, L, K] -> bool [B, L, K], the keys that are seen;
    None where it holds anything but 0 and the lowest number, or hides all from a row."""
    if mask.dim() != 4 or mask.shape[1] != 1 or not mask.is_floating_point():
        return None
    mask = mask[:, 0]
    seen, hidden = mask == 0, mask <= torch.finfo(mask.dtype).min
    if not bool((seen | hidden).all()) or not bool(seen.any(-1).all()):
        return None
    return seen


def seen_by(tokens: Tensor, images: Sequence[int], keys: Sequence[int], seen: Any) -> Seen:
    """tokens: bool [B, L], which rows are no padding. images: the image of each of the B texts.
    keys: how many each image has. seen: bool [B, L, K], or None where all keys are seen."""
    (batch, length), device = tokens.shape, tokens.device
    counts: list[int] = tokens.sum(1).tolist()
    flat = None if sum(counts) == tokens.numel() else tokens.flatten().nonzero().flatten()
    grids: dict[str, Any] = {"q_padding": Padding(batch, length, flat)}
    whole = Layout.from_lengths(counts, keys, images, device=device)
    most = max(keys, default=0)
    dense = replace(whole, **grids, kv_padding=Padding(len(keys), most, None))
    if seen is None or not sum(counts) or bool(seen.all()):
        return Seen(dense, None, dense)
    rows = seen.flatten(0, 1) if flat is None else seen.flatten(0, 1)[flat]
    texts = torch.arange(batch, device=device).repeat_interleave(length)
    texts = texts if flat is None else texts[flat]
    begins = torch.ones_like(texts, dtype=torch.bool)
    begins[1:] = (texts[1:] != texts[:-1]) | (rows[1:] != rows[:-1]).any(-1)
    starts = begins.nonzero().flatten()
    ends = torch.cat((starts[1:], starts.new_tensor([len(texts)])))
    patterns, kinds = torch.unique(rows[starts], dim=0, return_inverse=True)
    places = [pattern.nonzero().flatten() for pattern in patterns]
    firsts = [0]
    for count in keys:
        firsts.append(firsts[-1] + count)
    found: dict[tuple[int, int], int] = {}
    of_segment = [
        found.setdefault((images[text], kind), len(found))
        for text, kind in zip(texts[starts].tolist(), kinds.tolist())
    ]
    index = torch.cat([places[kind] + firsts[image] for image, kind in found])
    lengths = [len(places[kind]) for _, kind in found]
    layout = Layout.from_lengths((ends - starts).tolist(), lengths, of_segment, device=device)
    return Seen(replace(layout, **grids), index, dense)
