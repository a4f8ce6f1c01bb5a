"""Random samples for the tests of packing, and what a batch says, read back as plain records."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import torch
from torch import Tensor

GROUPS = [("caption", "de"), ("caption", "en"), ("translate", "de"), ("translate", "fr")]
# arXiv 2503.09443: mean tokens of the groups of its corpus, encoder and decoder, cap 128
CORPUS = [(16.6, 58.2), (16.4, 61.0), (59.7, 55.1), (47.2, 39.9), (44.5, 32.4), (44.3, 41.2)]
Record = tuple[int, tuple[int, ...], tuple[int, ...], int]


def image(number: int) -> Tensor:
    """A picture that says which one it is."""
    return torch.full((3, 2, 2), float(number))


def samples(count: int, seed: int = 0, most: int = 5) -> list[dict[str, Any]]:
    """Images 0 .. count - 1 with 1 to ``most`` targets, some of which share a prompt."""
    draw = random.Random(seed)
    return [
        {
            "pixel_values": image(number),
            "image_id": number,
            "targets": [
                {
                    "task": task,
                    "language": language,
                    "prompt_ids": [5, draw.randrange(10, 12)] * draw.randrange(1, 3),
                    "label_ids": [draw.randrange(10, 90) for _ in range(draw.randrange(1, 9))],
                }
                for task, language in draw.choices(GROUPS, k=draw.randrange(1, most + 1))
            ],
        }
        for number in range(count)
    ]


def flat(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each target."""
    return [
        {
            "pixel_values": sample["pixel_values"],
            "image_id": sample["image_id"],
            "input_ids": target["prompt_ids"],
            "labels": target["label_ids"],
            "task": target["task"],
            "language": target["language"],
        }
        for sample in given
        for target in sample["targets"]
    ]


def records(given: list[dict[str, Any]]) -> Counter[Record]:
    """What went in."""
    return Counter(
        (
            int(record["pixel_values"][0, 0, 0]),
            tuple(record["input_ids"]),
            tuple(record["labels"]),
            GROUPS.index((record["task"], record["language"])),
        )
        for record in flat(given)
    )


def read_back(batch: dict[str, Any]) -> Counter[Record]:
    """What a batch holds."""
    found: Counter[Record] = Counter()
    for target, row in enumerate(batch["prompt_of_target"].tolist()):
        picture = batch["pixel_values"][batch["image_of_prompt"][row]]
        prompt = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        labels = batch["labels"][target]
        found[
            int(picture[0, 0, 0]),
            tuple(prompt.tolist()),
            tuple(labels[labels != -100].tolist()),
            int(batch["groups"][target]),
        ] += 1
    return found


def corpus_lengths(count: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """(decoder tokens, encoder tokens, images) of samples as the reference workload has them."""
    draw = random.Random(seed)

    def length(mean: float) -> int:
        return min(128, max(4, round(draw.gammavariate(4.0, mean / 4.0))))

    chosen = draw.choices(CORPUS, k=count)
    return [(length(decoder), length(encoder), 1) for encoder, decoder in chosen]


class WordTokenizer:
    """The conventions of a transformers tokenizer, for words like "w12"."""

    pad_token_id = 1
    eos_token_id = 2

    def __call__(self, text: str) -> dict[str, list[int]]:
        words = [10 + int(word[1:]) for word in text.split()]
        return {"input_ids": [*words, self.eos_token_id], "attention_mask": [1] * (len(words) + 1)}
