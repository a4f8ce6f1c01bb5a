"""Token ids: from strings, cut to a limit, padded to a rectangle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastvlm.checks import describe, fail

Ids = tuple[int, ...]
PaddingSide = Literal["left", "right"]


def tokenize(text: str | Ids, tokenizer: Callable[..., Any] | None, argument: str, op: str) -> Ids:
    """Ids pass through; a string goes to a tokenizer that returns ``{"input_ids": [...]}``.

    ValueError: a string without a tokenizer, or a tokenizer that gives no flat list of ids.
    """
    if not isinstance(text, str):
        return text
    if tokenizer is None:
        raise fail(op, argument, "given where a sample holds text instead of ids", tokenizer)
    ids = tokenizer(text)["input_ids"]
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    if not all(isinstance(token, int) for token in ids):
        wanted = f"a tokenizer that gives a flat list of ids for {text[:40]!r}"
        raise fail(op, argument, wanted, ids)
    return tuple(ids)


def truncate(ids: Ids, limit: int | None, end: int | None) -> Ids:
    """The first ``limit`` ids; where they ended with the end token, the last of them is that."""
    if limit is None or len(ids) <= limit:
        return ids
    return (*ids[: limit - 1], end) if end is not None and ids[-1] == end else ids[:limit]


def pad(
    rows: Sequence[Ids], value: int, *, multiple: int | None = None, side: PaddingSide = "right"
) -> tuple[Tensor, Tensor]:
    """Rows of ids as int64 [rows, length] and the int64 mask of the same shape, 1 on tokens."""
    length = max(map(len, rows), default=0)
    if multiple is not None:
        length = -(-length // multiple) * multiple
    ids = torch.full((len(rows), length), value, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for row, tokens in enumerate(rows):
        n = len(tokens)
        where = slice(0, n) if side == "right" else slice(length - n, length)
        ids[row, where] = torch.tensor(tokens, dtype=torch.int64)
        mask[row, where] = 1
    return ids, mask


def count(op: str, argument: str, value: int | None, least: int = 1) -> None:
    """ValueError unless the value is None or a whole number of at least ``least``."""
    if value is not None and (type(value) is not int or value < least):
        raise ValueError(
            f"fastvlm.{op}: {argument} must be a whole number, {least} or more, or None; "
            f"got {describe(value)}"
        )


def token_id(tokenizer: Any, name: str, given: int | None) -> int | None:
    """A special token: as given, else the tokenizer's."""
    return given if given is not None else getattr(tokenizer, name, None)
