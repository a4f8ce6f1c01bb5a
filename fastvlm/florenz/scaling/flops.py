"""Multiply-adds of a forward pass of one sample, by PyTorch's own counter."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvlm.checks import fail

_OP = "florenz.scaling.macs_per_sample"


def macs_per_sample(
    config: Any, *, image_size: int = 224, prompt_tokens: int = 128, target_tokens: int = 128
) -> float:
    """Multiply-adds of a FlorenzConfig's unpatched model for one image, prompt and target.

    Sizes as the paper counts them: 224 pixels, 128 and 128 tokens. Nothing is allocated: the model
    is built on the meta device. Attention and the padding of windows count; norms, activations and
    softmax do not, as in fvcore's count, which the paper takes.
    ValueError: a size that is not above 0.
    """
    from fastvlm.florenz import FlorenzForConditionalGeneration

    for name, value in (
        ("image_size", image_size), ("prompt_tokens", prompt_tokens),
        ("target_tokens", target_tokens),
    ):  # fmt: skip
        if type(value) is not int or value < 1:
            raise fail(_OP, name, "a whole number, 1 or more", value)
    with torch.device("meta"):
        model = FlorenzForConditionalGeneration(config).eval()
        prompt = torch.zeros(1, prompt_tokens, config.encoder.d_model)
        targets = torch.zeros(1, target_tokens, dtype=torch.int64)
        pixels = torch.zeros(1, 3, image_size, image_size)
    # as the paper's; the masks of others look at values, which tensors without memory do not have
    model.set_attn_implementation("eager")
    inner: Any = model.model
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        # part by part: the model as a whole looks at its token ids
        image = inner.get_image_features(pixels).pooler_output.reshape(1, -1, prompt.shape[-1])
        states = inner.encoder(inputs_embeds=torch.cat([image, prompt], 1)).last_hidden_state
        model(encoder_outputs=(states,), decoder_input_ids=targets, use_cache=False)
    return counter.get_total_flops() / 2
