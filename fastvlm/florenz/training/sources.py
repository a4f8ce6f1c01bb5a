"""Where fine-tuning's samples come from: shards, a public set, the small world; each by number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fastvlm.decoding.pictures import as_rgb, open_picture
from fastvlm.florenz.data.annotations import (
    CAPTION,
    GROUPS,
    TRANSLATE,
    Annotation,
    marked_prompt,
)
from fastvlm.florenz.data.indexed import IndexedShards
from fastvlm.florenz.data.sets import EvaluationSet
from fastvlm.florenz.training.batches import Described, scene_at
from fastvlm.florenz.training.sizes import Size
from fastvlm.florenz.world.build import annotations_of_scene
from fastvlm.florenz.world.grammar import sentence

Group = tuple[str, str]
_UNSEEN = ("fr", "es", "ru", "zh")


class Source(Protocol):
    """A sequence of described pictures. groups: the (task, language) pairs that are in it."""

    groups: Sequence[Group]

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Described: ...


class ShardSource:
    """Of `IndexedShards`."""

    def __init__(self, shards: IndexedShards) -> None:
        self.shards = shards
        self.groups: Sequence[Group] = sorted(shards.tally.groups)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> Described:
        sample = self.shards[number]
        texts = [Annotation(**target) for target in sample["targets"]]
        return Described(sample["image"], sample["image_id"], texts)


class SetSource:
    """Of a set that is read for evaluation too: its references are what is learned."""

    def __init__(self, found: EvaluationSet) -> None:
        self.items, self.task = found.items, found.task
        self.groups: Sequence[Group] = sorted((self.task, code) for code in found.languages)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Described:
        item = self.items[number]
        texts = []
        for code, references in item.references.items():
            prompt = marked_prompt(code, "<CAPTION>")
            if item.source is not None:
                prompt = marked_prompt(code, TRANSLATE, item.source)
            texts += [Annotation(self.task, code, prompt, text) for text in references]
        is_picture = hasattr(item.image, "convert")
        image = as_rgb(item.image) if is_picture else open_picture(item.image)
        return Described(image, number, texts)


@dataclass(frozen=True)
class WorldSource:
    """Scenes with captions in all six languages beside the translations: what fine-tuning adds."""

    size: Size
    seed: int
    scenes: int = 10_000

    @property
    def groups(self) -> Sequence[Group]:
        return sorted([*GROUPS, *((CAPTION, code) for code in _UNSEEN)])

    def __len__(self) -> int:
        return self.scenes

    def __getitem__(self, number: int) -> Described:
        scene, picture, chance = scene_at(self.seed, "fine-tuning", number, self.size)
        texts = annotations_of_scene(scene, chance, self.size.variety)
        texts += [
            Annotation(CAPTION, code, marked_prompt(code, "<CAPTION>"), sentence(scene, code))
            for code in _UNSEEN
        ]
        return Described(picture, number, texts)


class Shuffled:
    """A source over and over, in another order each time; number counts on through all of them."""

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed = source, seed
        self._epoch, self._order = -1, list[int]()

    def __call__(self, number: int) -> Described:
        epoch, place = divmod(number, len(self.source))
        if epoch != self._epoch:
            self._order = list(range(len(self.source)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        return self.source[self._order[place]]
