"""answers.jsonl: what was written, and what a right answer says, so that it can be measured again,
and elsewhere: reading it needs no model and no transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastvlm.florenz.data.shards import DataError


@dataclass(frozen=True)
class Answer:
    """A model's text about a picture.

    item: its number in the set. image: its path, or its name where it was drawn. references: what a
    right answer says. source: the English text that was to be translated. right: of CoMMuTE,
    whether the right translation is likelier than the wrong one. split: of the item.
    """

    item: int
    image: str
    language: str
    text: str
    references: tuple[str, ...]
    source: str | None = None
    right: bool | None = None
    split: str = ""


def write_answers(file: Path, found: Sequence[Answer]) -> None:
    lines = (json.dumps(asdict(one), ensure_ascii=False) for one in found)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_answers(file: Path) -> list[Answer]:
    """DataError: a file that is not there, or a line that is no answer, by its number."""
    try:
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} does not read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            one = Answer(**{**record, "references": tuple(record["references"])})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{file}:{number}: no answer: {error}") from None
        if not one.references or not all(isinstance(t, str) for t in (one.text, *one.references)):
            raise DataError(f"{file}:{number}: no answer: a text, and references of it, are wanted")
        found.append(one)
    return found
