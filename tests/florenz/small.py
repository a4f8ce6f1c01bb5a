"""Small Florenz models with weights that make a difference, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.florenz import FlorenzConfig, FlorenzForConditionalGeneration

VOCAB, PROMPT_VOCAB = 99, 89
IMAGE_TOKENS = 5  # of a 64-pixel image: 1 + (64 / 32)^2

Batch = dict[str, Tensor]


def spread(model: nn.Module, std: float = 0.15, seed: int = 1) -> nn.Module:
    """Random values over the initial ones, so that every branch and every gate counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (std if p.dim() > 1 else 0.3))
    return model.eval()


def config(size: str, **overrides: Any) -> FlorenzConfig:
    """Without dropout, as two runs are compared; the target window is shorter than a prompt."""
    calm = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    small = FlorenzConfig.reduced(
        size, width=32, vocab_size=VOCAB, encoder_vocab_size=PROMPT_VOCAB, **overrides
    )
    small.vision_config.drop_path_rate = 0.0
    for part in (small.encoder, small.decoder):
        for name, value in calm.items():
            setattr(part, name, value)
    if small.has_gemma_decoder:
        small.decoder.sliding_window = 6
        small.decoder.attn_logit_softcapping = 5.0
    return small


def build(size: str, **overrides: Any) -> FlorenzForConditionalGeneration:
    torch.manual_seed(0)
    return spread(FlorenzForConditionalGeneration(config(size, **overrides)))


def images(count: int, seed: int = 2) -> Tensor:
    """Noise around another brightness each: noise alone has one and the same mean feature."""
    noise = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return noise + torch.linspace(-2, 2, count).view(-1, 1, 1, 1)


def prompts(
    model: FlorenzForConditionalGeneration, lengths: list[int], seed: int = 3
) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask: image tokens, a prompt that starts with 0 as BART's do."""
    longest = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, PROMPT_VOCAB, (len(lengths), longest), generator=generator)
    words[:, 0] = 0
    mask = (torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)).long()
    words = words.masked_fill(mask == 0, model.config.encoder.pad_token_id)
    image = torch.full((len(lengths), IMAGE_TOKENS), model.config.image_token_id)
    return torch.cat([image, words], 1), torch.cat([torch.ones_like(image), mask], 1)


def targets(lengths: list[int], seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    hidden = torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1)
    return labels.masked_fill(hidden, -100)


def batch(model: FlorenzForConditionalGeneration) -> Batch:
    """Three images with a prompt each, padded."""
    ids, mask = prompts(model, [6, 2, 4])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": images(3)}


def gradients(model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads
