"""Sentences of the small world in six languages, and what a sentence says, read back.

A caption that a model writes is right or wrong by reading it: no reference is compared, no judge is
asked. Every sentence that the grammars give reads back as the scene it was made from.
"""

# ruff: noqa: RUF001 (some of it is Cyrillic)

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import ModuleType

from fastvlm.checks import choice
from fastvlm.florenz.world.languages import chinese, english, french, german, russian, spanish
from fastvlm.florenz.world.scene import (
    COLOURS,
    KINDS,
    MOST,
    PLACES,
    RELATIONS,
    SIZES,
    Group,
    Scene,
)

LANGUAGES: dict[str, ModuleType] = {
    "en": english,
    "de": german,
    "fr": french,
    "es": spanish,
    "ru": russian,
    "zh": chinese,
}
# a caption begins as the first; the others are sentences of a text
FRAMES = ("shows", "exists", "seen")
# how a caption begins, whatever it goes on to say: "изображен" would have to agree
PREFIXES = {
    "en": "The image shows",
    "de": "Das Bild zeigt",
    "fr": "La photo montre",
    "es": "La imagen muestra",
    "ru": "На картинке",
    "zh": "图为",
}
_OP = "florenz.world"
_WORD = re.compile(r"[^\W\d_]+['’]?")


def sentence(scene: Scene, language: str, frame: str = "shows") -> str:
    """A scene in words. frame: "shows" (a caption), "exists" or "seen" (other sentences).

    ValueError: a language or a frame that there is not.
    """
    choice(_OP, "language", language, tuple(LANGUAGES))
    choice(_OP, "frame", frame, FRAMES)
    return str(LANGUAGES[language].sentence(scene, frame))


@dataclass(frozen=True)
class Reading:
    """What a sentence says. language: most of whose words it has, or None where it has none.

    groups: those that it names, in the order of the sentence. scene: what it says as a whole, if
    it is a sentence of that language's grammar, to the letter.
    """

    language: str | None
    groups: tuple[Group, ...]
    scene: Scene | None


def read(text: str, language: str | None = None) -> Reading:
    """What a text says, in the language it is in, or in the one that is given.

    ValueError: a language that there is not.
    """
    if language is not None:
        choice(_OP, "language", language, tuple(LANGUAGES))
    spoken = language_of(text)
    code = language or spoken
    if code is None:
        return Reading(None, (), None)
    groups = tuple(_groups(text, code))
    return Reading(spoken, groups, _scene(text.strip(), code, groups))


def language_of(text: str) -> str | None:
    """The language most of whose words a text has; None where it has none of any."""
    words = _units(text)
    counts = Counter({code: sum(word in _vocabulary(code) for word in words) for code in LANGUAGES})
    (code, most), (_, next_most) = counts.most_common(2)
    return code if most > next_most else None


def _units(text: str) -> list[str]:
    """Words in lower case; in Chinese every character is one."""
    units: list[str] = []
    for word in _WORD.findall(text.lower()):
        units.extend(word if "一" <= word[0] <= "鿿" else [word])
    return units


def all_groups() -> Iterator[Group]:
    """Every group that there is."""
    for count, size, colour, kind in product(range(1, MOST + 1), (None, *SIZES), COLOURS, KINDS):
        yield Group(count, size, colour, kind)


@cache
def _phrases(code: str) -> dict[tuple[str, ...], Group]:
    """The words of every group in every case."""
    language = LANGUAGES[code]
    return {
        tuple(_units(language.noun_phrase(group, case))): group
        for group in all_groups()
        for case in language.CASES
    }


def texts(language: str) -> Iterator[str]:
    """Phrases and sentences that hold every word of a language in every form.

    ValueError: a language that there is not.
    """
    choice(_OP, "language", language, tuple(LANGUAGES))
    module = LANGUAGES[language]
    for group, case in product(all_groups(), module.CASES):
        yield module.noun_phrase(group, case)
    second = Group(2, None, "red", "cup")
    for frame, kind, count in product(FRAMES, KINDS, range(1, MOST + 1)):
        yield sentence(Scene(Group(count, None, "red", kind)), language, frame)
    for frame, place, relation in product(FRAMES, (None, *PLACES), RELATIONS):
        first = Group(1, None, "red", "ball")
        yield sentence(Scene(first, relation, second, place), language, frame)
        yield sentence(Scene(second, relation, first, place), language, frame)


@cache
def _vocabulary(code: str) -> frozenset[str]:
    return frozenset(word for text in texts(code) for word in _units(text))


def _groups(text: str, code: str) -> Iterator[Group]:
    """The groups that a text names, the longest phrase first, from left to right."""
    units, phrases = _units(text), _phrases(code)
    longest = max(map(len, phrases))
    at = 0
    while at < len(units):
        for length in range(min(longest, len(units) - at), 0, -1):
            group = phrases.get(tuple(units[at : at + length]))
            if group is not None:
                yield group
                at += length
                break
        else:
            at += 1


def _scene(text: str, code: str, groups: tuple[Group, ...]) -> Scene | None:
    """The scene whose sentence this is: one that its groups could make."""
    for scene in _scenes(groups):
        if any(sentence(scene, code, frame) == text for frame in FRAMES):
            return scene
    return None


def _scenes(groups: tuple[Group, ...]) -> Iterator[Scene]:
    places = (None, *PLACES)
    if len(groups) == 1:
        for place in places:
            yield Scene(groups[0], place=place)
    elif len(groups) == 2:
        for (first, second), relation, place in product((groups, groups[::-1]), RELATIONS, places):
            yield Scene(first, relation, second, place)
