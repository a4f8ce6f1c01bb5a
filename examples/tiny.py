"""A model and a data set small enough to run the examples anywhere, in seconds.

The model reads what PackingCollator makes: images and prompts once, and which of them each target
reads. It stands where your own model does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TASKS = [("caption", "en"), ("caption", "de"), ("translate", "fr")]
PAD, START = 1, 2


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
        pixels = torch.randn(3, 8, 8, generator=draw)
        result.append({"pixel_values": pixels, "image_id": number, "targets": targets})
    return result


class TinyModel(nn.Module):
    """Means instead of attention: enough to have a loss that falls."""

    def __init__(self, vocab: int = 32, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vision = nn.Linear(3 * 8 * 8, width)
        self.tokens = nn.Embedding(vocab, width)
        self.head = nn.Linear(width, vocab)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_of_prompt: Tensor,
        prompt_of_target: Tensor,
        labels: Tensor,
        decoder_input_ids: Tensor,
        groups: Tensor,
        num_groups: int,
    ) -> dict[str, Tensor]:
        images = self.vision(pixel_values.flatten(1))
        mask = attention_mask[..., None]
        prompts = (self.tokens(input_ids) * mask).sum(1) / mask.sum(1)
        read = (prompts + images[image_of_prompt])[prompt_of_target]
        logits = self.head(self.tokens(decoder_input_ids) + read[:, None])
        losses = nn.functional.cross_entropy(logits.mT, labels, reduction="none")
        counts = (labels != -100).sum(1)
        by_group = losses.new_zeros(2, num_groups)
        by_group[0].index_add_(0, groups, losses.detach().sum(1))
        by_group[1].index_add_(0, groups, counts.to(losses.dtype))
        return {"loss": losses.sum() / counts.sum(), "group_losses": by_group[0] / by_group[1]}
