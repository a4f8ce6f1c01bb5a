"""What a mask of transformers [batch, 1, queries, keys] says, as layouts of packed rows.

A mask is looked at once and remembered: all layers of a forward get the same tensor. Whatever is
found is compared with the whole mask, so a mask of any origin may come; one that says something
else (a window without causality, a prefix, numbers to be added) is `None` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastvlm.compat import pytorch
from fastvlm.layout import Layout


@dataclass(frozen=True, eq=False)
class Keys:
    """All query rows of a batch element see the same keys: no mask, padding, cross-attention.

    layout: a segment of all query rows for each batch element, and the keys that it reads.
    kept: int64, these keys' rows in the grid [batch * keys]; None where it is all of them.
    """

    layout: Layout
    kept: Tensor | None


@dataclass(frozen=True, eq=False)
class Rest:
    """Rows that do not see themselves (padding behind a text) and see all of their element's text.

    rows: int64, their places in the grid [batch * length]. layout: a segment for each element.
    """

    rows: Tensor
    layout: Layout


@dataclass(frozen=True, eq=False)
class Causal:
    """Rows see their own segment up to themselves: a text, or several side by side.

    layout: the segments, which read themselves. kept: int64, the rows that are in one, of the grid
    [batch * length]; None where all are. window: of so many positions, its own included; None: all.
    rest: rows outside of the segments that see something. All other rows see nothing.
    keys: how many of the keys there are; those behind (an empty static cache) nobody sees.
    """

    layout: Layout
    kept: Tensor | None
    window: int | None
    rest: Rest | None
    keys: int


Reading = Keys | Causal


@lru_cache(maxsize=64)
def all_keys(batch: int, queries: int, keys: int, device: torch.device) -> Keys:
    """What no mask says where attention is not causal."""
    return Keys(Layout.from_lengths([queries] * batch, [keys] * batch, device=device), None)


@lru_cache(maxsize=64)
def all_causal(batch: int, length: int, device: torch.device) -> Causal:
    """What no mask says where attention is causal."""
    layout = Layout.from_lengths([length] * batch, device=device)
    return Causal(layout, None, None, None, length)


@dataclass(frozen=True)
class _Note:
    version: int
    asked: tuple[Any, ...]
    found: Any


# by mask; a mask that was written to since is looked at again
_notes = pytorch.notes_on_tensors()


def _noted(mask: Tensor, asked: tuple[Any, ...], find: Any) -> Any:
    version = pytorch.version_of(mask)
    if version is None:
        return find()  # an inference tensor: nobody counts what is written to it
    note = _notes.get(mask)
    if note is None or note.version != version or note.asked != asked:
        note = _notes[mask] = _Note(version, asked, find())
    return note.found


def read(mask: Tensor, batch: int, queries: int, keys: int) -> Reading | None:
    """What a mask [batch or 1, 1, queries or 1, keys] says; None where it cannot be said in
    layouts. Waits for the device, once for each mask."""
    if not _fits(mask, batch, queries, keys):
        return None
    asked = ("read", batch, queries, keys)
    found: Reading | None = _noted(mask, asked, lambda: _read(mask, batch, queries, keys))
    return found


def step(mask: Tensor, batch: int, keys: int) -> tuple[Tensor, Tensor | None] | None:
    """The lengths [batch] and the ancestry [batch, keys] (None: each row its own) that
    `ops.cached_attention` takes, of a mask [batch or 1, 1, 1, keys]; None where it adds numbers."""
    if not _fits(mask, batch, 1, keys):
        return None
    found: tuple[Tensor, Tensor | None] | None
    found = _noted(mask, ("step", batch, keys), lambda: _step(mask, batch, keys))
    return found


def every_key(batch: int, keys: int, device: torch.device) -> Tensor:
    """The lengths of a step in which each row sees its whole cache."""
    return torch.full((batch,), keys, dtype=torch.int32, device=device)


def _fits(mask: Tensor, batch: int, queries: int, keys: int) -> bool:
    return (
        mask.dim() == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] == 1
        and mask.shape[2] in (1, queries)
        and mask.shape[3] == keys
        and not mask.requires_grad
    )


def _visible(mask: Tensor) -> Tensor | None:
    """True where a key is seen; None where a mask adds numbers of its own.

    What is hidden by the least number of a dtype weighs nothing, unless all of a row is hidden:
    then all keys weigh the same, and that no layout can say.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return None
    seen = mask == 0
    plain = (seen | (mask <= torch.finfo(mask.dtype).min)).all() & seen.any(-1).all()
    return seen if plain else None


def _step(mask: Tensor, batch: int, keys: int) -> tuple[Tensor, Tensor | None] | None:
    seen = _visible(mask)
    if seen is None:
        return None
    seen = seen[:, 0, 0].expand(batch, keys)
    lengths = every_key(batch, keys, mask.device)
    if mask.device.type == "cpu" and seen.all():
        return lengths, None  # on a GPU asking costs more than it saves
    own = torch.arange(batch, dtype=torch.int32, device=mask.device).unsqueeze(1)
    return lengths, torch.where(seen, own, -1)


def _read(mask: Tensor, batch: int, queries: int, keys: int) -> Reading | None:
    if mask.stride(0) == 0:
        mask = mask[:1]  # one for all
    seen = _visible(mask)
    if seen is None:
        return None
    seen = seen[:, 0]
    if seen.shape[1] == 1 or bool((seen == seen[:, :1]).all()):
        return _keys(seen[:, 0].expand(batch, keys), queries)
    if keys > queries and not seen[:, :, queries:].any():
        seen = seen[:, :, :queries]  # the empty part of a static cache
    return _causal(seen, batch) if seen.shape[2] == queries else None


def _keys(seen: Tensor, queries: int) -> Keys:
    batch, keys = seen.shape
    lengths = seen.sum(1).tolist()
    if sum(lengths) == batch * keys:
        return all_keys(batch, queries, keys, seen.device)
    layout = Layout.from_lengths([queries] * batch, lengths, device=seen.device)
    return Keys(layout, _places(seen))


def _places(rows: Tensor) -> Tensor:
    return rows.flatten().nonzero().flatten()


def _causal(seen: Tensor, batch: int) -> Causal | None:
    """seen: [batch or 1, length, length]."""
    length = seen.shape[1]
    at = torch.arange(length, device=seen.device)
    own = seen.diagonal(dim1=1, dim2=2)
    number, first = seen.sum(-1), seen.to(torch.uint8).argmax(-1)
    wanted = own.unsqueeze(1) & (at <= at.unsqueeze(1)) & (at >= first.unsqueeze(-1))
    if not torch.equal(seen, wanted & (number > 0).unsqueeze(-1)):
        return None
    # each row sees, of the rows that see themselves, the last ones up to itself: what follows is of
    # the size of the batch, and goes on where numbers are at hand
    own, number, first = (x.cpu().expand(batch, length) for x in (own, number, first))
    real = _places(own)
    begins = (own & (first == torch.arange(length))).flatten()[real]
    segment = begins.cumsum(0) - 1
    lengths = segment.bincount()
    starts = begins.nonzero().flatten()
    before = torch.arange(real.numel()) - starts[segment] + 1  # positions up to and with its own
    window = None
    if not torch.equal(number.flatten()[real], before):
        window = int(number.flatten()[real].max())
        if not torch.equal(number.flatten()[real], before.clamp(max=window)):
            return None
    rest = None
    others = ~own & (number > 0)
    if others.any():
        text = own.sum(1)
        if not torch.equal(number[others], text.unsqueeze(1).expand(batch, length)[others]):
            return None
        layout = Layout.from_lengths(others.sum(1), text, device=seen.device)
        rest = Rest(_places(others).to(seen.device), layout)
    if real.numel() == batch * length:
        kept = None
        if window is None and lengths.numel() == batch:
            return all_causal(batch, length, seen.device)
    else:
        kept = real.to(seen.device)
    layout = Layout.from_lengths(lengths, device=seen.device)
    return Causal(layout, kept, window, rest, length)


def packed(q_ends: Tensor, k_ends: Tensor, device: torch.device) -> Layout:
    """The layout that cu_seq_lens_q and cu_seq_lens_k describe, on a device; remembered."""
    alone = q_ends is k_ends  # a note that held its own key would never be forgotten
    asked = ("packed", device, pytorch.version_of(k_ends))
    version, note = pytorch.version_of(q_ends), _notes.get(q_ends)
    if note is not None and note.asked == asked and note.version == version:
        layout, of = note.found
        if (of is None) if alone else (of is k_ends):
            return layout
    layout = Layout.from_offsets(q_ends, None if alone else k_ends).to(device)
    if version is not None and asked[-1] is not None:
        _notes[q_ends] = _Note(version, asked, (layout, None if alone else k_ends))
    return layout
