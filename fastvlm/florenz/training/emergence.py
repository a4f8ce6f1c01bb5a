"""What emerged: captions in all six languages, read back by the grammar, and losses by group.

Groups as the paper has them: SC seen captioning (En, De), ST seen translation, UC unseen captioning
(Fr, Es, Ru, Zh).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import fastvlm
from fastvlm.florenz.data.annotations import CAPTION, Annotation, marked_prompt
from fastvlm.florenz.losses import text_losses
from fastvlm.florenz.training.batches import Words, pixels_of, scene_at
from fastvlm.florenz.training.sizes import Size
from fastvlm.florenz.world.build import annotations_of_scene
from fastvlm.florenz.world.grammar import PREFIXES, language_of, read, sentence
from fastvlm.florenz.world.scene import Scene

SEEN, UNSEEN = ("en", "de"), ("fr", "es", "ru", "zh")
LOSSES = ("SC", "ST", "UC")
_MOST_TOKENS = 40
_BATCH = 16


@dataclass(frozen=True)
class Shown:
    """A scene that training has not drawn, its picture, and texts about it in all languages."""

    scene: Scene
    picture: Any
    annotations: tuple[Annotation, ...]


def held_out(size: Size, count: int, seed: int = 0) -> list[Shown]:
    """The same scenes for every run of a size, whatever seed it was trained with."""
    found = []
    for number in range(count):
        scene, picture, chance = scene_at(seed, "test", number, size)
        texts = annotations_of_scene(scene, chance, size.variety)
        texts += [
            Annotation(CAPTION, code, marked_prompt(code, "<CAPTION>"), sentence(scene, code))
            for code in UNSEEN
        ]
        found.append(Shown(scene, picture, tuple(texts)))
    return found


def group_of(annotation: Annotation) -> str:
    if annotation.task != CAPTION:
        return "ST"
    return "SC" if annotation.language in SEEN else "UC"


def losses(model: Any, words: Words, size: Size, shown: Sequence[Shown]) -> dict[str, float]:
    """SC, ST, UC: the mean over texts of their mean over tokens, each text without the others."""
    sums = {name: [0.0, 0] for name in LOSSES}
    for start in range(0, len(shown), _BATCH):
        some = shown[start : start + _BATCH]
        pictures = [(pixels_of(one.picture), one.annotations) for one in some]
        found = text_losses(model, words, pictures, size.image_tokens)
        for name, loss in zip(_names(some), chain.from_iterable(found), strict=True):
            sums[name][0] += loss
            sums[name][1] += 1
    return {name: total / count for name, (total, count) in sums.items()}


def _names(shown: Sequence[Shown]) -> list[str]:
    return [group_of(text) for one in shown for text in one.annotations]


@dataclass(frozen=True)
class Score:
    """Shares of captions.

    language: those in the asked language, behind the prefix. objects: those of them that name the
    right groups, in any order and however they are said to lie. exact: those of them that are a
    sentence of its grammar, to the letter, and say the very scene, from either of its groups.
    spoken: of all captions, how many are in each language.
    """

    language: float
    objects: float
    exact: float
    spoken: dict[str, int]


def captions(
    model: Any, processor: Any, tokenizer: Any, shown: Sequence[Shown], languages: Sequence[str],
    *, prompt: str = "<CAPTION>", prefix: bool = True, num_beams: int = 1,
) -> list[list[str]]:  # fmt: skip
    """A caption of each picture in each language; prefix: whether it begins with the first words
    of its language, which then are part of it. prompt: as `fastvlm.caption` takes it."""
    begin = {code: PREFIXES[code] if prefix else "" for code in languages}
    was_training = model.training
    model.eval()
    try:
        found = fastvlm.caption(
            model, processor, (one.picture for one in shown), list(languages),
            tokenizer=tokenizer, prompt=prompt, prefixes=begin, keep_prefix=True,
            num_beams=num_beams, max_new_tokens=_MOST_TOKENS, batch_size=_BATCH,
        )  # fmt: skip
        rows: list[list[str]] = [[] for _ in shown]
        for one in found:
            rows[one.image].append(one.text)
    finally:
        model.train(was_training)
    return rows


def score(scenes: Sequence[Scene], texts: Sequence[str], language: str) -> Score:
    """texts: one of each scene, asked for in a language. ValueError: unequally many."""
    asked = objects = exact = 0
    spoken: dict[str, int] = {}
    for scene, text in zip(scenes, texts, strict=True):
        # the prefix was given, and says nothing of what the model speaks
        code = language_of(text.removeprefix(PREFIXES[language])) or "none"
        spoken[code] = spoken.get(code, 0) + 1
        if code != language:
            continue
        said = read(text, language)
        asked += 1
        objects += sorted(map(repr, said.groups)) == sorted(map(repr, scene.groups))
        exact += said.scene in (scene, scene.mirrored)
    count = max(1, len(texts))
    return Score(asked / count, objects / count, exact / count, spoken)
