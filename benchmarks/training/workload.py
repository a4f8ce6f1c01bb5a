"""The models and batches that the training benchmarks run: Florenz, frozen as published.

Lengths are drawn from the means of the paper's corpus (arXiv 2503.09443, token counts of the
released data): seven (task, language) pairs in equal shares. What their spread is was not
published; a log-normal one of sigma 0.5 stands in for it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvlm.florenz import FlorenzConfig, FlorenzForConditionalGeneration, freeze_as_published

# (task, language): mean tokens of the prompt and of the target
PAIRS = {
    "caption-en": (16.6, 58.2),
    "caption-de": (16.4, 61.0),
    "translation-de": (59.7, 55.1),
    "translation-es": (47.2, 39.9),
    "translation-zh": (44.5, 32.4),
    "translation-ru": (44.3, 41.2),
    "translation-fr": (44.9, 40.6),
}
SIGMA = 0.5
MOST = 128  # tokens of a prompt, and of a target
PIXELS = 224
IMAGE_TOKENS = 1 + (PIXELS // 32) ** 2


@dataclass(frozen=True)
class Shape:
    """A model that is trained here. images: of a micro-batch."""

    name: str
    config: dict[str, Any]
    images: int
    size: str

    def model(self) -> FlorenzForConditionalGeneration:
        """Random weights, frozen as published, transformers' eager attention."""
        torch.manual_seed(0)
        if self.config:
            config = FlorenzConfig.reduced(self.size, **self.config)
        else:
            config = FlorenzConfig.of_size(self.size)
        config._attn_implementation = "eager"
        model = FlorenzForConditionalGeneration(config)
        return freeze_as_published(model).train()


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("florenz-0.4B", {}, 8, "0.4B"),
        Shape("florenz-0.4B-half-width", {"layers": 6, "width": 384}, 16, "0.4B"),
        Shape("florenz-gemma-4-layers", {"layers": 4, "width": 512}, 16, "3.5B"),
        Shape("drift-florence", {"layers": 2, "width": 128, "vocab_size": 8192}, 4, "0.4B"),
        Shape("drift-gemma", {"layers": 2, "width": 128, "vocab_size": 8192}, 4, "3.5B"),
        Shape("tiny", {"layers": 2, "width": 32, "vocab_size": 99, "encoder_vocab_size": 99}, 3,
              "3.5B"),
    )
}  # fmt: skip

TIMED = ("florenz-0.4B-half-width", "florenz-gemma-4-layers")


def _length(draw: random.Random, mean: float) -> int:
    drawn = draw.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA)
    return min(MOST, max(3, round(drawn)))


def _padded(rows: Sequence[Tensor], padding: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=padding)


def batch(config: FlorenzConfig, images: int, targets: int, seed: int = 0) -> dict[str, Tensor]:
    """images with so many targets each, every image and every prompt once; padded to the longest.

    With one target to an image it is an ordinary batch.
    """
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    names = list(PAIRS)
    prompts, labels, image_of_prompt = [], [], []
    for image in range(images):
        first = draw.randrange(len(names))
        for number in range(targets):
            mean_prompt, mean_target = PAIRS[names[(first + number) % len(names)]]
            sizes = _length(draw, mean_prompt), _length(draw, mean_target)
            words = [
                torch.randint(3, size, (n,), generator=generator)
                for n, size in zip(sizes, (config.encoder.vocab_size, config.decoder.vocab_size))
            ]
            image_of_prompt.append(image)
            prompts.append(words[0].clamp_max(config.image_token_id - 1))
            labels.append(words[1])
    ids = _padded(prompts, 1)
    mask = _padded([torch.ones_like(p) for p in prompts], 0)
    placeholders = torch.full((len(ids), IMAGE_TOKENS), config.image_token_id)
    found = {
        "input_ids": torch.cat([placeholders, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(placeholders), mask], 1),
        "pixel_values": torch.randn(images, 3, PIXELS, PIXELS, generator=generator),
        "labels": _padded(labels, -100),
    }
    if targets > 1:
        found["image_of_prompt"] = torch.tensor(image_of_prompt)
    return found


def tokens(found: dict[str, Tensor]) -> dict[str, float]:
    """What the padded grids hold: tokens, and the share of them."""
    labels, mask = found["labels"] != -100, found["attention_mask"] != 0
    return {
        "targets": len(labels),
        "images": len(found["pixel_values"]),
        "decoder_tokens": int(labels.sum()),
        "decoder_filled": round(labels.float().mean().item(), 3),
        "encoder_tokens": int(mask.sum()),
        "encoder_filled": round(mask.float().mean().item(), 3),
    }
