"""Batches for the types of models: each gives one for generate(), and one with labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import torch
from bert_models import blip_inputs, blip_training
from sizes import PAD
from torch import Tensor, nn

Batch = dict[str, Any]
Batches = Callable[[], tuple[Batch, Batch]]  # one for generate(), one with labels


def ids_and_mask(
    lengths: tuple[int, ...], left: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    ids = models._tokens(len(lengths), max(lengths), seed)
    return models._pad(ids, list(lengths), left)


def labels() -> Tensor:
    ids, mask = ids_and_mask((7, 3, 5), seed=5)
    return ids.masked_fill(mask == 0, -100)


def text() -> tuple[Batch, Batch]:
    ids, mask = ids_and_mask((9, 4, 6))
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs, {**inputs, "labels": labels()}


def causal() -> tuple[Batch, Batch]:
    ids, mask = ids_and_mask((9, 4, 6), left=True)
    right, seen = ids_and_mask((9, 4, 6))
    batch = {"input_ids": right, "attention_mask": seen}
    return (
        {"input_ids": ids, "attention_mask": mask},
        {**batch, "labels": right.masked_fill(seen == 0, -100)},
    )


def generating() -> tuple[Batch, Batch]:
    """Of experts, whose products torch has not in float64: no exact loss to measure from."""
    return causal()[0], {}


def typed() -> tuple[Batch, Batch]:
    """Gemma-3 wants to be told in training which tokens are of an image: none."""
    inputs, training = causal()
    return inputs, {**training, "token_type_ids": torch.zeros_like(training["input_ids"])}


def numbers(name: str, *shape: int) -> Batches:
    def batches() -> tuple[Batch, Batch]:
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
        return {name: values}, {name: values, "labels": labels()}

    return batches


def formula() -> tuple[Batch, Batch]:
    """PP-FormulaNet takes labels beside the tokens that they follow."""
    inputs, training = image()
    return inputs, {**training, "decoder_input_ids": training["labels"].clamp_min(PAD)}


def acting() -> tuple[Batch, Batch]:
    """A decision transformer generates nothing, and has no loss."""
    return {}, {}


def spectrogram() -> tuple[Batch, Batch]:
    """Pop2Piano generates with a table of composers that no toy has."""
    return {}, numbers("input_features", 3, 9, 32)()[1]


image = numbers("pixel_values", 3, 3, 32, 32)
waveform = numbers("input_values", 3, 400)


def caption() -> tuple[Batch, Batch]:
    return blip_inputs(nn.Module()), blip_training(nn.Module())


def page() -> tuple[Batch, Batch]:
    """Patches of a page as Kosmos-2.5 reads them, and texts that begin with four of its states."""
    inputs, training = causal()
    draw = torch.Generator().manual_seed(2)
    places = torch.cartesian_prod(torch.arange(1.0, 4), torch.arange(1.0, 3)).expand(3, -1, -1)
    patches = torch.cat([places, torch.randn(3, 6, 768, generator=draw)], 2)

    def beside(batch: Batch) -> Batch:
        begin, seen = torch.full((3, 4), 3), torch.ones(3, 4, dtype=torch.int64)
        mask = torch.cat([seen, torch.zeros_like(batch["input_ids"])], 1)
        whole = {
            "input_ids": torch.cat([begin, batch["input_ids"]], 1),
            "attention_mask": torch.cat([seen, batch["attention_mask"]], 1),
        }
        if "labels" in batch:
            whole["labels"] = torch.cat([torch.full((3, 4), -100), batch["labels"]], 1)
        return {**whole, "flattened_patches": patches, "image_embeds_position_mask": mask}

    return beside(inputs), beside(training)


def answer() -> tuple[Batch, Batch]:
    """Questions of several lengths, whose padding BLIP reads."""
    inputs = {**image()[0], **text()[0]}
    return inputs, {**inputs, "labels": labels().clamp_min(PAD)}
