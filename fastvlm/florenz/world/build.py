"""Training data of the small world: captions in English and German, translations into five."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from fastvlm.checks import fail
from fastvlm.florenz.data.annotations import (
    CAPTION,
    GROUPS,
    TRANSLATE,
    TRANSLATION,
    Annotation,
    marked_prompt,
)
from fastvlm.florenz.world.draw import draw
from fastvlm.florenz.world.grammar import FRAMES, sentence
from fastvlm.florenz.world.scene import ALL, Scene, Variety, draw_scene, related_scene


def annotations_of_scene(
    scene: Scene, chance: random.Random, variety: Variety = ALL
) -> list[Annotation]:
    """One annotation of each group of pre-training (`fastvlm.florenz.data.GROUPS`).

    A caption tells the scene. A translation is of a sentence about another scene that shares a
    group with it, as the sentences that a search finds for a picture do.
    """
    found = []
    for task, code in GROUPS:
        if task == CAPTION:
            prompt = marked_prompt(code, "<CAPTION>")
            found.append(Annotation(CAPTION, code, prompt, sentence(scene, code)))
            continue
        other, frame = related_scene(scene, chance, variety), chance.choice(FRAMES)
        prompt = marked_prompt(code, TRANSLATE, sentence(other, "en", frame))
        found.append(Annotation(TRANSLATION, code, prompt, sentence(other, code, frame)))
    return found


def samples(
    count: int, *, size: int = 224, seed: int = 0
) -> Iterator[tuple[Any, list[Annotation]]]:
    """count random scenes as (picture of size x size pixels, annotations), the same for a seed.

    ValueError: count below 1.
    """
    if type(count) is not int or count < 1:
        raise fail("florenz.world", "count", "a whole number, 1 or more", count)
    for number in range(count):
        chance = random.Random(f"{seed}/{number}")
        scene = draw_scene(chance)
        picture = draw(scene, size, seed=chance.randrange(2**31))
        yield picture, annotations_of_scene(scene, chance)
