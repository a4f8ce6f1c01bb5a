"""Sets to evaluate on or to learn from: pictures with texts, whatever file they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastvlm.florenz.data.annotations import CAPTION, TRANSLATION
from fastvlm.florenz.data.shards import DataError

NAMES = (
    "world", "world-translation", "multi30k", "multi30k-translation", "commute", "xm3600", "coco",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A picture, and texts about it by language.

    image: a path, or a picture of Pillow. name: of the picture. references: what a right answer
    says. source: the English text to translate; None: the picture is to be described. wrong: by
    language a translation that the picture rules out. split: the part of a set that it is of.
    """

    image: Any
    name: str
    references: Mapping[str, tuple[str, ...]]
    source: str | None = None
    wrong: Mapping[str, str] = field(default_factory=dict)
    split: str = ""


@dataclass(frozen=True)
class EvaluationSet:
    """Items of one task. prefixes: the first words of captions, where they are not those of
    `fastvlm.decoding.languages`; keep_prefix: whether references begin with them.
    scenes: of the small world, one an item."""

    name: str
    items: tuple[Item, ...]
    prefixes: Mapping[str, str] | None = None
    keep_prefix: bool = False
    scenes: tuple[Any, ...] = ()

    @property
    def task(self) -> str:
        return CAPTION if self.items[0].source is None else TRANSLATION

    @property
    def languages(self) -> list[str]:
        """All that some item has references in, in the order met."""
        return list(dict.fromkeys(code for item in self.items for code in item.references))


def _in_languages(item: Item, codes: Sequence[str]) -> Item:
    references = {code: item.references[code] for code in codes if code in item.references}
    wrong = {code: item.wrong[code] for code in codes if code in item.wrong}
    return replace(item, references=references, wrong=wrong)


def chosen(
    found: EvaluationSet, languages: Sequence[str] | None, limit: int | None
) -> EvaluationSet:
    """The set in these languages, and its first items. DataError: a language that it is not in."""
    wanted = found.languages if languages is None else list(languages)
    if unknown := [code for code in wanted if code not in found.languages]:
        known = ", ".join(found.languages)
        raise DataError(f"{found.name} is in {known}; not in {', '.join(unknown)}")
    items = tuple(_in_languages(item, wanted) for item in found.items)
    items = tuple(item for item in items if item.references)[:limit]
    return EvaluationSet(
        found.name, items, found.prefixes, found.keep_prefix, found.scenes[: len(items)]
    )
