"""The small world as a set: scenes that no run has drawn for training, in all six languages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastvlm.florenz.data.annotations import TRANSLATE, TRANSLATION
from fastvlm.florenz.data.sets import EvaluationSet, Item
from fastvlm.florenz.evaluation.records import Answer
from fastvlm.florenz.training.emergence import held_out, score
from fastvlm.florenz.training.sizes import Size
from fastvlm.florenz.world.grammar import LANGUAGES, PREFIXES, sentence


def world_captions(size: Size, count: int) -> EvaluationSet:
    """Captions; a scene has two references where it can be told from either of its groups."""
    items, scenes = [], []
    for number, one in enumerate(held_out(size, count)):
        told = dict.fromkeys((one.scene, one.scene.mirrored))
        references = {c: tuple(sentence(scene, c) for scene in told) for c in LANGUAGES}
        items.append(Item(one.picture, f"scene {number}", references))
        scenes.append(one.scene)
    return EvaluationSet("world", tuple(items), PREFIXES, True, tuple(scenes))


def world_translations(size: Size, count: int) -> EvaluationSet:
    """Sentences about another scene that shares a group with the picture, as in training; each
    language has a sentence of its own."""
    items = [
        Item(
            one.picture, f"scene {number}", {text.language: (text.text,)},
            text.prompt.partition(TRANSLATE)[2],
        )
        for number, one in enumerate(held_out(size, count))
        for text in one.annotations
        if text.task == TRANSLATION
    ]  # fmt: skip
    return EvaluationSet("world-translation", tuple(items))


def shares(asked: EvaluationSet, found: Sequence[Answer], language: str) -> dict[str, float]:
    """Of captions in a language, hundredths: in that language, with the right things, exact (see
    `fastvlm.florenz.training.emergence.Score`)."""
    scenes: list[Any] = [asked.scenes[one.item] for one in found]
    told = score(scenes, [one.text for one in found], language)
    return {
        "in the language": 100 * told.language, "right things": 100 * told.objects,
        "exact": 100 * told.exact,
    }  # fmt: skip
