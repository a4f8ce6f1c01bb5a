"""Batches of the small world, each a function of the seed and its number: nothing to download, and
a run that resumes, or shares its batches with other processes, sees what it would have seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvlm.decoding.languages import TASKS
from fastvlm.florenz.data.annotations import GROUPS, Annotation, spelled_prompt
from fastvlm.florenz.training.sizes import Size
from fastvlm.florenz.training.tokenizers import prompt_tokenizer, text_tokenizer
from fastvlm.florenz.world.build import annotations_of_scene
from fastvlm.florenz.world.draw import draw
from fastvlm.florenz.world.grammar import FRAMES, sentence
from fastvlm.florenz.world.scene import Scene, draw_scene
from fastvlm.loading.processors import IMAGE_MEAN, IMAGE_STD
from fastvlm.packing import PackingCollator, TargetBalancer


def pixels_of(picture: Any) -> Tensor:
    """An RGB picture as pixel_values float32 [3, H, W]."""
    scaled = (np.asarray(picture, dtype=np.float32) / 255 - IMAGE_MEAN) / IMAGE_STD
    return torch.from_numpy(scaled.astype(np.float32)).permute(2, 0, 1).contiguous()


def scene_at(seed: int, name: str, number: int, size: Size) -> tuple[Scene, Any, random.Random]:
    """A scene, its picture, and the chance that goes on from there. name: of the split."""
    chance = random.Random(f"{seed}/{name}/{number}")
    scene = draw_scene(chance, size.variety)
    return scene, draw(scene, size.pixels, seed=chance.randrange(2**31)), chance


class Words:
    """Annotations as ids: <s>prompt</s>, and <bos>text<eos>, as published.

    bare: prompts of captions name no language.
    """

    def __init__(self, prompts: Any, texts: Any, *, bare: bool = False) -> None:
        self.prompts, self.texts, self.bare = prompts, texts, bare

    @property
    def caption_prompt(self) -> str:
        """As `fastvlm.caption` takes it."""
        return TASKS["<CAPTION>"] if self.bare else "<CAPTION>"

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        spelled = [spelled_prompt(prompt, bare=self.bare) for prompt in prompts]
        return _enclosed(self.prompts, spelled)

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return _enclosed(self.texts, texts)

    def targets(self, annotations: Sequence[Annotation]) -> list[dict[str, Any]]:
        prompts = self.prompt_ids([one.prompt for one in annotations])
        labels = self.text_ids([one.text for one in annotations])
        return [
            {"task": one.task, "language": one.language, "prompt_ids": prompt, "label_ids": label}
            for one, prompt, label in zip(annotations, prompts, labels)
        ]


def _enclosed(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in found]


def world_words(prompts: str = "named") -> Words:
    """Of the small world. prompts: one of `settings.PROMPTS`."""
    bare = prompts == "bare"
    return Words(prompt_tokenizer(bare=bare), text_tokenizer(), bare=bare)


@dataclass(frozen=True)
class Described:
    """A picture (of Pillow, or pixel_values float32 [3, H, W]) and texts about it. Equal ids are of
    equal pictures."""

    image: Any
    image_id: Hashable
    annotations: Sequence[Annotation]


class Batches(Dataset[list[Any]]):
    """Training batches: lists of samples, whose targets the collator chose in balance.

    described: the picture of a number, counted through all batches. images: of a batch.
    """

    def __init__(
        self, described: Callable[[int], Described], words: Words, collator: PackingCollator,
        *, images: int, batches: int,
    ) -> None:  # fmt: skip
        self.described, self.words, self.collator = described, words, collator
        self.images, self.batches = images, batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> list[Any]:
        self.collator.seed_balance(index)
        first = index * self.images
        described = [self.described(first + image) for image in range(self.images)]
        # of all pictures at once: a call of a tokenizer costs more than the words of a text
        targets = iter(self.words.targets([text for one in described for text in one.annotations]))
        return [self._sample(one, [next(targets) for _ in one.annotations]) for one in described]

    def _sample(self, one: Described, targets: list[dict[str, Any]]) -> Any:
        name = "pixel_values" if isinstance(one.image, Tensor) else "image"
        return self.collator.prepare(
            {name: one.image, "image_id": one.image_id, "targets": targets}
        )


def world_batches(
    size: Size, words: Words, collator: PackingCollator, batches: int, seed: int
) -> Batches:
    """Of scenes drawn as they are asked for, with the texts of pre-training."""

    def described(number: int) -> Described:
        scene, picture, chance = scene_at(seed, "train", number, size)
        texts = annotations_of_scene(scene, chance, size.variety)
        return Described(pixels_of(picture), number, texts)

    return Batches(described, words, collator, images=size.images, batches=batches)


def collator_of(size: Size, config: Any, seed: int) -> PackingCollator:
    """Each image once, beside so many targets of it as the size says, by (task, language)."""
    return PackingCollator(
        groups=GROUPS,
        pad_token_id=config.encoder.pad_token_id,
        decoder_pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        image_token_id=config.image_token_id,
        num_image_tokens=size.image_tokens,
        max_targets_per_image=size.targets,
        balance=TargetBalancer(GROUPS, seed=seed),
    )


class Sentences(Dataset[list[Any]]):
    """Batches of sentences for a language model, in its languages in turn."""

    def __init__(
        self, size: Size, words: Words, languages: Sequence[str], batches: int, seed: int
    ) -> None:
        self.size, self.words, self.languages = size, words, languages
        self.batches, self.seed = batches, seed

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> list[Any]:
        chance = random.Random(f"{self.seed}/sentences/{index}")
        found = []
        for row in range(self.size.images * self.size.targets):
            scene = draw_scene(chance, self.size.variety)
            code = self.languages[row % len(self.languages)]
            found.append(sentence(scene, code, chance.choice(FRAMES)))
        return self.words.text_ids(found)


def sentence_batch(rows: list[list[list[int]]], start: int, pad: int) -> dict[str, Tensor]:
    """input_ids [S, L]: start and the ids of each sentence; labels: the ids, -100 elsewhere."""
    texts = [text for batch in rows for text in batch]
    longest = 1 + max(map(len, texts))
    ids = torch.full((len(texts), longest), pad)
    labels = torch.full((len(texts), longest), -100)
    for row, text in enumerate(texts):
        ids[row, 0] = start
        ids[row, 1 : 1 + len(text)] = labels[row, 1 : 1 + len(text)] = torch.tensor(text)
    return {"input_ids": ids, "labels": labels}
