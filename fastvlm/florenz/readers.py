"""Which row reads which: checks of image_of_prompt and prompt_of_target."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm.checks import fail
from fastvlm.compat.modeling import torch_compilable_check

OP = "florenz"


def check_readers(
    argument: str,
    index: Tensor | None,
    readers: int,
    read: int,
    names: tuple[str, str],
    shared: bool = False,
) -> None:
    """index int64 [readers] with values in [0, read); None where reader r reads row r.

    names: what reads and what is read, for the message. shared: without an index consecutive
    groups of readers may read one row (beams of a patched model). ValueError otherwise.
    """
    if index is None:
        if readers != read and not (shared and read and readers % read == 0):
            wanted = f"given where {readers} {names[0]} read {read} {names[1]}"
            raise fail(OP, argument, wanted, None)
        return
    wanted = f"int64 of shape [{readers}] with values in [0, {read})"
    shape = (readers,)
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or tuple(index.shape) != shape:
        raise fail(OP, argument, wanted, index)
    if readers:
        inside = (index.min() >= 0) & (index.max() < read)
        torch_compilable_check(inside, lambda: str(fail(OP, argument, wanted, index.tolist())))


def take(rows: Tensor, index: Tensor | None) -> Tensor:
    """rows[index], or the rows themselves."""
    return rows if index is None else rows.index_select(0, index.to(rows.device))
