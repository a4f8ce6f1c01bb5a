"""A model and a data set small enough to run the examples anywhere, in seconds.

The model is a Florenz (Florence-2's encoder before Gemma-2 layers with cross-attention) of a few
thousand parameters, patched by fastvlm. It stands where your own model does.
"""

from __future__ import annotations

from typing import Any

import torch

import fastvlm
from fastvlm.florenz import FlorenzConfig, FlorenzForConditionalGeneration

TASKS = [("caption", "en"), ("caption", "de"), ("translate", "fr")]
VOCABULARY, PIXELS = 32, 64
# the placeholders of an image of 64 pixels: 1 + (64 / 32)^2, with the id behind the vocabulary
IMAGE_TOKENS = {"image_token_id": VOCABULARY, "num_image_tokens": 5}
SPECIAL_IDS = {"pad_token_id": 1, "decoder_pad_token_id": 0, "decoder_start_token_id": 1}


def samples(count: int = 24) -> list[dict[str, Any]]:
    """Images with one to three targets, as ids."""
    draw = torch.Generator().manual_seed(0)
    result = []
    for number in range(count):
        targets = [
            {
                "task": task,
                "language": language,
                "prompt_ids": [3, 10 + index],
                "label_ids": [20 + index] * int(torch.randint(3, 12, (), generator=draw)),
            }
            for index, (task, language) in enumerate(TASKS[: 1 + number % 3])
        ]
        pixels = torch.randn(3, PIXELS, PIXELS, generator=draw)
        result.append({"pixel_values": pixels, "image_id": number, "targets": targets})
    return result


def model() -> FlorenzForConditionalGeneration:
    torch.manual_seed(0)
    config = FlorenzConfig.reduced(
        "3.5B", layers=2, width=32, vocab_size=VOCABULARY, encoder_vocab_size=VOCABULARY
    )
    made = FlorenzForConditionalGeneration(config)
    fastvlm.patch(made)
    return made
