"""The model and the inputs of the job: Florence-2-base with random weights, or a tiny one."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.demo.workload import PROMPT_TOKENS
from fastvlm.loading import random_florence2 as florence2

PROMPT = PROMPT_TOKENS


@dataclass(frozen=True)
class Sizes:
    """pixels: of captioning and of the long step; short: of the step with small images."""

    pixels: int = florence2.IMAGE_SIZE
    short: int = 224
    photos: int = 4
    short_batch: int = 8
    tokens: int = 32
    labels: tuple[int, int] = (20, 128)
    prompts: tuple[int, int] = (17, 60)


TINY = Sizes(96, 64, 2, 2, 6, (3, 9), (2, 5))


def build(tiny: bool) -> Any:
    return florence2.random_model(florence2.small() if tiny else florence2.florence2_base())


def captioning(model: Any, sizes: Sizes, photos: int) -> dict[str, Tensor]:
    """What generate() takes: so many photos (one, turned and shifted) and a prompt for each."""
    photo, _ = florence2.load_photo(None)
    pixels = torch.cat(
        [florence2.to_pixels(photo.rotate(15 * i), sizes.pixels) for i in range(photos)]
    )
    ids = _with_image(model, torch.Generator().manual_seed(1), sizes.pixels, [PROMPT] * photos)
    return {**ids, "pixel_values": pixels}


def training(model: Any, pixels: int, batch: int, sizes: Sizes) -> dict[str, Tensor]:
    """A padded batch: prompts and labels of many lengths, drawn from a fixed seed."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(2)
    prompts = [draw.randint(*sizes.prompts) for _ in range(batch)]
    lengths = [draw.randint(*sizes.labels) for _ in range(batch)]
    # the longest of each is there, as in a corpus
    prompts[0], lengths[-1] = sizes.prompts[1], sizes.labels[1]
    labels = torch.randint(
        4, model.config.image_token_id, (batch, max(lengths)), generator=generator
    )
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    return {
        **_with_image(model, generator, pixels, prompts),
        "pixel_values": torch.randn(batch, 3, pixels, pixels, generator=generator),
        "labels": labels,
    }


def _with_image(
    model: Any, generator: torch.Generator, pixels: int, prompts: list[int]
) -> dict[str, Tensor]:
    """Placeholders of an image and a prompt of so many tokens in each row, padded."""
    image_token, padding = model.config.image_token_id, model.config.text_config.pad_token_id
    images = torch.full((len(prompts), 1 + (pixels // 32) ** 2), image_token)
    # 0 to 3 are BART's special tokens, the last one is the image's
    ids = torch.randint(4, image_token, (len(prompts), max(prompts)), generator=generator)
    mask = torch.arange(max(prompts)) < torch.tensor(prompts)[:, None]
    ids = torch.cat([images, ids.masked_fill(~mask, padding)], 1)
    mask = torch.cat([torch.ones_like(images), mask.long()], 1)
    return {"input_ids": ids, "attention_mask": mask}
