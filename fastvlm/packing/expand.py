"""A packed batch as one target per row: what a model without fastvlm takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastvlm.checks import fail


def expand(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Repeats images and prompts for each target of a PackingCollator's batch.

    Returns pixel_values [S, 3, H, W], input_ids and attention_mask [S, E], labels [S, L] and, if
    it is there, decoder_input_ids [S, L]. For a plain model, and to compare with one.
    """
    prompt = batch["prompt_of_target"]
    rows = {name: batch[name][prompt] for name in ("input_ids", "attention_mask")}
    same = {name: batch[name] for name in ("labels", "decoder_input_ids") if name in batch}
    if not isinstance(batch["pixel_values"], Tensor):
        raise fail(
            "packing.expand", "batch", "made without vision_features", sorted(batch["pixel_values"])
        )
    pixels = batch["pixel_values"][batch["image_of_prompt"][prompt]]
    return {"pixel_values": pixels, **rows, **same}
