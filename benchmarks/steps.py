"""The decoding part of generate(), timed: what a step takes, whatever model runs it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.demo.workload import random_workload
from fastvlm.decoding.prefixes import decoder_stack
from fastvlm.loading.random_florence2 import load_photo

SHORT, LONG, BEAMS = 8, 64, 3


def step_weights(model: Any) -> int:
    """Bytes of the weights that one step reads: the decoder's and the head's."""
    decoder = decoder_stack(model)
    read = {id(model.lm_head.weight): model.lm_head.weight}
    for name, module in decoder.named_modules():
        per_image = "encoder_attn" in name and name.endswith(("k_proj", "v_proj"))
        if isinstance(module, nn.Linear) and not per_image:
            read[id(module.weight)] = module.weight
    return sum(weight.numel() * weight.element_size() for weight in read.values())


@dataclasses.dataclass
class Captioning:
    """generate() of `model` behind an encoder that has run; its last call's tokens of all beams.

    There is no end token, so that a caption is as long as it is asked to be without a processor
    that looks for that token in the whole vocabulary at each step.
    """

    model: Any
    states: Tensor
    mask: Tensor
    settings: dict[str, Any]
    tokens: Tensor | None = None

    def by(self, model: Any) -> Captioning:
        """The same captions by another model."""
        return dataclasses.replace(self, model=model, tokens=None)

    def __call__(self, tokens: int) -> float:
        settings = {**self.settings, "max_new_tokens": tokens}
        start = time.perf_counter()
        self.tokens = self.model.generate(
            encoder_outputs=BaseModelOutput(self.states), attention_mask=self.mask, **settings
        )
        return time.perf_counter() - start

    def step(self, rounds: int = 1) -> float:
        """Seconds: the difference of a long and a short caption, by its tokens."""
        found = []
        for _ in range(rounds):
            short, long = self(SHORT), self(LONG)
            found.append((long - short) / (LONG - SHORT))
        return statistics.median(found)


def random_captioning(tiny: bool) -> Captioning:
    """Florence-2-base with random weights, or a tiny one, and the states of one photo."""
    photo, _ = load_photo(None)
    work = random_workload(photo, beams=BEAMS, new_tokens=LONG, tiny=tiny)
    start = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        output = work.model(**work.inputs, decoder_input_ids=start, use_cache=False)
    mask = work.inputs["attention_mask"]
    settings = {k: v for k, v in work.settings.items() if k != "min_new_tokens"}
    settings["eos_token_id"] = None
    return Captioning(work.model, output.encoder_last_hidden_state, mask, settings)
