"""The loss of single texts about pictures: what scaling laws are fitted to, and what tells which of
two translations a model finds likelier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlm.florenz.data.annotations import Annotation
from fastvlm.packing import PackingCollator


class Targets(Protocol):
    """`fastvlm.florenz.training.batches.Words`."""

    def targets(self, annotations: Sequence[Annotation]) -> list[dict[str, Any]]: ...


@torch.no_grad()
def text_losses(
    model: Any,
    words: Targets,
    pictures: Sequence[tuple[Tensor, Sequence[Annotation]]],
    image_tokens: int,
) -> list[list[float]]:
    """The mean over its tokens of each text's loss, picture by picture; one forward pass.

    pictures: pixel_values [3, H, W] with the texts about them. image_tokens: positions that the
    model makes of one. Texts do not see each other. The model's mode is left as it is; it is
    evaluated in eval mode.
    """
    config = model.config
    # every text is a group of its own
    groups = [(str(i), str(j)) for i, (_, texts) in enumerate(pictures) for j in range(len(texts))]
    collator = PackingCollator(
        groups=groups, pad_token_id=config.encoder.pad_token_id,
        decoder_pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        image_token_id=config.image_token_id, num_image_tokens=image_tokens,
    )  # fmt: skip
    batch = collator([
        {
            "pixel_values": pixels, "image_id": i,
            "targets": [
                {**target, "task": str(i), "language": str(j)}
                for j, target in enumerate(words.targets(texts))
            ],
        }
        for i, (pixels, texts) in enumerate(pictures)
    ])  # fmt: skip
    batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    given = {k: v for k, v in batch.items() if k not in ("groups", "num_groups", "labels")}
    was_training = model.training
    model.eval()
    try:
        total, tokens = group_sums(model(**given).logits, batch)
    finally:
        model.train(was_training)
    means = iter((total / tokens).tolist())
    return [[next(means) for _ in texts] for _, texts in pictures]


def group_sums(logits: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Summed loss and tokens [num_groups] of logits [S, L, V] over labels [S, L]."""
    labels, groups, count = inputs["labels"], inputs["groups"], inputs["num_groups"]
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none"
    ).view(labels.shape)
    sums = losses.new_zeros(count).index_add_(0, groups, losses.sum(1))
    tokens = sums.new_zeros(count).index_add_(0, groups, (labels != -100).sum(1).to(sums.dtype))
    return sums, tokens


@torch.no_grad()
def image_tokens_of(model: Any, height: int, width: int) -> int:
    """Positions that a model makes of one picture of that size: small towers halve it less often
    than the published one does."""
    pixels = torch.zeros(1, 3, height, width, device=model.device, dtype=model.dtype)
    was_training = model.training
    model.eval()
    try:
        found: Tensor = model.get_image_features(pixels).pooler_output
    finally:
        model.train(was_training)
    return found.shape[1]
