"""The encoder's part of many captions: each image is seen once, each prompt read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvlm.checks import fail

_OP = "decoding.encode_once"


@dataclass(frozen=True)
class Encoded:
    """What a decoder reads, for each image (slow) and prompt (fast): row i * num_prompts + p.

    states [I * P, E, d] in the model's dtype: the image's positions, then the prompt's, padded on
    the right. mask int64 [I * P, E]: 0 at padding. input_ids int64 [I * P, E]: the tokens that
    stand for them, image_token_id at the image's positions.
    """

    states: Tensor
    mask: Tensor
    input_ids: Tensor
    num_images: int
    num_prompts: int


@torch.no_grad()
def encode_once(
    model: Any, pixel_values: Tensor | Mapping[str, Any], prompts: Sequence[Sequence[int]]
) -> Encoded:
    """Encode images [I, 3, H, W] under each of the prompts, every combination.

    pixel_values: also what `fastvlm.VisionFeatures.pixel_values` gives.

    model: a Florence-2 or Florenz model, patched or not. prompts: token ids, with the special
    tokens that the model expects (Florence-2: bos, text, eos), without the image's placeholders.
    The vision tower sees each image once, the text encoder each image with each prompt; the order
    of positions is that of transformers' Florence2Processor. For
    ``model.generate(encoder_outputs=BaseModelOutput(encoded.states), attention_mask=encoded.mask,
    ...)``, or the forward pass. ValueError: pixel_values of another shape, no or empty prompts.
    """
    kept = isinstance(pixel_values, Mapping)
    if not kept and (not isinstance(pixel_values, Tensor) or pixel_values.dim() != 4):
        raise fail(_OP, "pixel_values", "a tensor [images, 3, H, W]", pixel_values)
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise fail(_OP, "prompts", "one sequence of token ids or more, none empty", prompts)
    device = model.device
    # kept features are moved by the tower that takes them
    pixels = (
        pixel_values.to(device, model.dtype) if isinstance(pixel_values, Tensor) else pixel_values
    )
    features = model.get_image_features(pixels).pooler_output
    ids, mask = _padded(prompts, device)
    words = model.get_input_embeddings()(ids)
    images, length = features.shape[:2]
    count = len(prompts)
    image_ids = ids.new_full((images * count, length), model.config.image_token_id)
    input_ids = torch.cat([image_ids, ids.repeat(images, 1)], 1)
    attention_mask = torch.cat([torch.ones_like(image_ids), mask.repeat(images, 1)], 1)
    features = features.to(words.device, words.dtype).repeat_interleave(count, 0)
    embeds = torch.cat([features, words.repeat(images, 1, 1)], 1)
    encoder = model.get_encoder()
    states = encoder(inputs_embeds=embeds, attention_mask=attention_mask).last_hidden_state
    return Encoded(states, attention_mask, input_ids, images, count)


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask, int64 [P, longest]. Padding is masked, so any valid id serves: the first's."""
    longest = max(len(prompt) for prompt in prompts)
    rows = [[*prompt, *[prompts[0][0]] * (longest - len(prompt))] for prompt in prompts]
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    mask = (torch.arange(longest, device=device) < lengths).long()
    return torch.tensor(rows, device=device), mask
