"""The vision tower of Florence-2, random weights: transformers' own with sdpa, and patched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvlm
from benchmarks.cases import VISION
from benchmarks.kinds import VisionCase
from benchmarks.measure import Operands
from benchmarks.micro import each
from fastvlm.loading.random_florence2 import SEED, florence2_base


def model(config: Any | None = None) -> Any:
    """A Florence-2 whose language model is kept small: only the tower is timed."""
    from transformers import Florence2ForConditionalGeneration

    if config is None:
        config = florence2_base()
        config.text_config.encoder_layers = config.text_config.decoder_layers = 1
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Florence2ForConditionalGeneration(config).eval()


def towers(theirs: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """The same weights twice: both sides stand side by side to alternate."""
    ours = copy.deepcopy(theirs)
    fastvlm.patch(ours)

    def side(whole: Any) -> Callable[[Tensor], Tensor]:
        tower = whole.model.vision_tower
        return lambda pixels: tower(pixels).last_hidden_state

    return {"transformers": side(theirs), "fastvlm": side(ours)}


@each(VISION)
def test_vision(
    run_case: Callable[..., None], case: VisionCase, dtype: torch.dtype, device: str
) -> None:
    pytest.importorskip("transformers")
    size = case.image_size

    def operands() -> Operands:
        return (torch.randn(1, 3, size, size, dtype=dtype, device=device),)

    run_case(case, dtype, operands, towers(model().to(device)))
