"""Published tensors into a model: which are wanted, whether they are there, and their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvlm.loading import configs, names
from fastvlm.loading.errors import LoadError, named
from fastvlm.loading.tensors import Entry

_TABLE = {
    "microsoft": "model.language_model.shared.weight",
    "paper": "model.decoder.embed_tokens.weight",
}
# names of one table in a file: of all that are stored the values must agree
_TABLES = {
    "microsoft": (names.SHARED, names.ENCODER_TABLE, names.DECODER_TABLE),
    "paper": (names.DECODER_TABLE,),
}
_OUR_HEAD = "lm_head.weight"
_ROWS = 65_536  # rows of two tables that are compared at a time


@dataclass(frozen=True)
class Tie:
    """Whether the head is the table, and the name under which the files have the table."""

    tied: bool
    table: str


def config_of(layout: str, where: str, raw: dict[str, Any], tied: bool) -> Any:
    """The config of our class; LoadError as ``configs.microsoft``."""
    make = configs.microsoft if layout == "microsoft" else configs.paper
    try:
        return make(where, raw, tied)
    except LoadError:
        raise
    except Exception as error:  # transformers' validation has errors of its own
        problem = " ".join(str(error).split())
        raise LoadError(where, f"config.json does not fit together ({problem})") from error


def class_of(layout: str) -> Any:
    if layout == "microsoft":
        from transformers import Florence2ForConditionalGeneration

        return Florence2ForConditionalGeneration
    from fastvlm.florenz import FlorenzForConditionalGeneration

    return FlorenzForConditionalGeneration


def shapes(cls: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model's state by our name; no weights are made."""
    with torch.device("meta"):
        model = cls(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def tie(layout: str, where: str, raw: dict[str, Any], entries: dict[str, Entry]) -> Tie:
    """How the head and the tables of a checkpoint hang together.

    Microsoft's code ties the head of a new model and not of one that it loads: a head that was
    trained apart is a head of its own. Both codes leave out what is tied when they save.
    LoadError: tables that must agree and do not, a head that is missing.
    """
    tied = configs.is_tied(raw)
    stored = [name for name in _TABLES[layout] if name in entries]
    for other in stored[1:]:
        if not _equal(entries[stored[0]], entries[other]):
            raise LoadError(where, f"{other} must equal {stored[0]}: it is one table")
    has_head = names.HEAD in entries
    if not has_head and not tied:
        wanted = "must be there, as tie_word_embeddings is false"
        raise LoadError(where, f"{names.HEAD} {wanted}; it is not")
    if not stored:
        return Tie(tied, names.HEAD if tied else _TABLES[layout][0])
    table = stored[0]
    if not tied or not has_head or _equal(entries[table], entries[names.HEAD]):
        return Tie(tied, table)
    if layout == "paper":
        wanted = f"must equal {table}, as tie_word_embeddings is true"
        raise LoadError(where, f"{names.HEAD} {wanted}; it does not")
    return Tie(False, table)


def match(
    layout: str, where: str, tie: Tie, shapes: dict[str, tuple[int, ...]], entries: dict[str, Entry]
) -> dict[str, Entry]:
    """A tensor of the files for each of ours that is no other name of one.

    LoadError: missing, surplus or misshapen tensors, a bias that the model has no place for.
    """
    left = dict(entries)
    bias = left.pop(names.LOGITS_BIAS, None)
    if bias is not None and bias.read().count_nonzero():
        raise LoadError(where, f"{names.LOGITS_BIAS} must be zero: the model has no such bias")
    reads: dict[str, Entry] = {}
    missing, misshapen = [], []
    for ours, shape in shapes.items():
        theirs = names.published(ours)
        if (ours == _OUR_HEAD and tie.tied) or (
            theirs in _TABLES[layout] and ours != _TABLE[layout]
        ):
            continue
        stored = tie.table if ours == _TABLE[layout] else theirs
        wanted = shape[::-1] if theirs == names.PROJECTION else shape
        entry = entries.get(stored)
        left.pop(stored, None)
        if entry is None:
            missing.append(f"{stored} {list(wanted)}")
        elif entry.shape != wanted:
            misshapen.append(f"{stored} must be {list(wanted)}, is {list(entry.shape)}")
        else:
            reads[ours] = entry
    surplus = [name for name in left if name not in (*_TABLES[layout], names.HEAD)]
    if missing:
        raise LoadError(where, f"tensors missing ({len(missing)}): {named(missing)}")
    if misshapen:
        raise LoadError(where, f"tensors of another shape ({len(misshapen)}): {named(misshapen)}")
    if surplus:
        raise LoadError(
            where, f"tensors without a place in the model ({len(surplus)}): {named(surplus)}"
        )
    return reads


def _equal(a: Entry, b: Entry) -> bool:
    if a.shape != b.shape:
        return False
    left, right = a.read(), b.read()
    if left.data_ptr() == right.data_ptr():
        return True
    return all(torch.equal(x, y) for x, y in zip(left.split(_ROWS), right.split(_ROWS)))


def values(reads: dict[str, Entry], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of the model: one copy of each tensor, in the dtype, off the file.

    LoadError: a file that ends before its tensors.
    """
    state = {}
    for ours, entry in reads.items():
        try:
            value = entry.read()
        except (RuntimeError, OSError, ValueError) as error:
            raise LoadError(entry.file, f"is cut off ({error})") from error
        if len(entry.shape) == 2 and ours.endswith("image_projection.weight"):
            value = value.T
        wanted = dtype if value.is_floating_point() else value.dtype
        state[ours] = value.to(wanted, copy=True, memory_format=torch.contiguous_format)
    return state
