"""Decoder rows that begin with prefixes of several lengths, in one generate() call, exactly.

Shorter rows are padded on the left and masked. Rotary positions are relative, so where a row
starts does not matter to them. Learned positions are counted by column in transformers' decoders;
`row_positions` counts them from each row's own start. The filler is the start token itself: it is
masked in attention, and what looks at the ids (a repetition penalty, n-grams that must not come
again) finds nothing there that the row alone would not have.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.compat import hf, pytorch
from fastvlm.nn.wrapped import unwrapped


def left_padded(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """ids int64 [R, longest], mask int64 of the same shape or None where nothing is padded, and
    the number of columns before each row's start, int64 [R]."""
    longest = max(len(row) for row in rows)
    pads = torch.tensor([longest - len(row) for row in rows], device=device)
    ids = torch.tensor([[row[0]] * (longest - len(row)) + list(row) for row in rows], device=device)
    if not pads.any():
        return ids, None, pads
    mask = (torch.arange(longest, device=device) >= pads.unsqueeze(1)).long()
    return ids, mask, pads


def decoder_stack(model: Any) -> Any:
    """The stack of layers that decodes, or None where none is found.

    A composed model's get_decoder() may give a model that has one, or a wrapper around one.
    """
    found = model
    while not hasattr(found, "layers"):
        inner = found.get_decoder() if hasattr(found, "get_decoder") else None
        if inner is None or inner is found:
            return None
        found = inner
    return unwrapped(found, "layers") or found


def _learned_positions(stack: Any) -> nn.Embedding | None:
    table = getattr(stack, "embed_positions", None)
    if not isinstance(table, nn.Embedding) or not hf.tells_positions_the_rows(stack):
        return None
    takes = inspect.signature(type(table).forward).parameters
    return table if "position_ids" in takes else None


def may_pad(model: Any) -> bool:
    """Whether rows of this model give the same padded on the left as alone."""
    stack = decoder_stack(model)
    if stack is None:
        return False
    return _learned_positions(stack) is not None or hasattr(stack, "rotary_emb")


def _grid(of: Any) -> Any:
    """Rows and columns of what a table is called with: token ids, or their shape (Marian)."""
    return tuple(of.shape if isinstance(of, Tensor) else of)[:2]


class _Rows:
    """Hooks on a table of learned positions, for one `row_positions`."""

    def __init__(self, pads: Tensor) -> None:
        self.pads = pads

    def starts(self, rows: int) -> Tensor:
        return self.pads.repeat_interleave(rows // self.pads.shape[0])

    def before(self, table: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if _current.rows.get(id(table)) is not self:
            return None
        starts = self.starts(_grid(args[0])[0]).view(-1, 1)
        positions = (kwargs["position_ids"].view(1, -1) - starts).clamp(min=0)
        return args, {**kwargs, "position_ids": positions.flatten()}

    def after(self, table: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if _current.rows.get(id(table)) is not self:
            return None
        batch, length = _grid(args[0])
        return output.view(batch, length, output.shape[-1])


class _Current(threading.local):
    """By table, whose rows this thread decodes; others may use the same model meanwhile."""

    def __init__(self) -> None:
        self.rows: dict[int, _Rows] = {}


_current = _Current()


@contextlib.contextmanager
def row_positions(model: Any, pads: Tensor) -> Iterator[None]:
    """Inside, learned positions of a decoder's row count from pads[row] on, not from column 0.

    pads int64 [R]; a call has R rows, or a multiple of it (beams of a row are neighbours). For
    calls of this thread only.
    """
    table = _learned_positions(decoder_stack(model))
    if table is None or not pads.any():
        yield
        return
    rows, outer = _Rows(pads), dict(_current.rows)
    handles = [
        table.register_forward_pre_hook(rows.before, with_kwargs=True),
        table.register_forward_hook(rows.after),
    ]
    _current.rows[id(table)] = rows
    try:
        yield
    finally:
        _current.rows = outer
        for handle in handles:
            handle.remove()


def starts_of(table: nn.Module, rows: int) -> Tensor | None:
    """int64 [rows], the column in which each row starts; None where all start in the first."""
    found = _current.rows.get(id(table))
    return None if found is None else found.starts(rows)


def only_counts(table: nn.Module) -> bool:
    """Whether a table of positions has no hooks but those of `row_positions`."""
    hooks = pytorch.forward_hooks(table)
    ours = all(isinstance(getattr(hook, "__self__", None), _Rows) for hook in hooks)
    return ours and "forward" not in vars(table)
