"""What the demo and the end-to-end benchmark run: a photo, a prompt, a Florence-2, generate()."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastvlm.compat import attentions
from fastvlm.loading.errors import LoadError, first_line
from fastvlm.loading.load import load
from fastvlm.loading.random_florence2 import (
    IMAGE_SIZE,
    SEED,
    florence2_base,
    florence2_large,
    random_model,
    small,
    to_pixels,
)
from fastvlm.usage import UsageError

PROMPT = "<CAPTION>"  # Florence-2's processor turns it into "What does the image describe?"
PROMPT_TOKENS = 16


@dataclass
class Workload:
    """A model, its inputs and how its generate() is called; decode turns token ids into text."""

    model: nn.Module
    inputs: dict[str, Tensor]
    settings: dict[str, Any]
    facts: dict[str, Any]
    decode: Callable[[Tensor], str] | None = None

    def generate(self, most_tokens: int | None = None) -> Tensor:
        """The token ids of all beams, [beams, length]; most_tokens shortens a warm-up."""
        settings = dict(self.settings)
        if most_tokens is not None:
            settings["max_new_tokens"] = min(most_tokens, settings["max_new_tokens"])
            if "min_new_tokens" in settings:
                settings["min_new_tokens"] = settings["max_new_tokens"]
        tokens: Tensor = self.model.generate(**self.inputs, **settings)  # type: ignore[operator]
        return tokens


def random_workload(
    photo: Image.Image,
    *,
    beams: int,
    new_tokens: int,
    tiny: bool = False,
    large: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """Florence-2-base's shapes (or large's, or a tiny model's), random weights, a random prompt.

    On a GPU the weights are drawn there: others than on a CPU, in a fraction of the time.
    """
    size = 96 if tiny else IMAGE_SIZE
    config = small() if tiny else florence2_large() if large else florence2_base()
    with torch.device(device):
        model = random_model(config).to(dtype)
    config = model.config
    image_tokens = 1 + (size // 32) ** 2
    generator = torch.Generator().manual_seed(SEED)
    # 0 to 3 are BART's special tokens, the last one is the image's
    prompt = torch.randint(4, config.image_token_id, (1, PROMPT_TOKENS), generator=generator)
    image = torch.full((1, image_tokens), config.image_token_id)
    ids = torch.cat([image, prompt], dim=1).to(device)
    return Workload(
        model=model,
        inputs={
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": to_pixels(photo, size).to(device, dtype),
        },
        settings={**_settings(beams, new_tokens), "min_new_tokens": new_tokens},
        facts={
            "model": "a tiny Florence-2" if tiny else f"Florence-2-{'large' if large else 'base'}",
            "weights": "random",
            "seed": SEED,
            **_facts(model, ids, config.image_token_id, size),
        },
    )


def pretrained_workload(
    photo: Image.Image, model_id: str, *, beams: int, new_tokens: int, device: str = "cpu"
) -> Workload:
    """Real weights of any layout, the model's own processor, the caption prompt."""
    wanted = "a Florence-2 model id or folder, with its processor"
    try:
        found = load(model_id, dtype=torch.float32, device=device)
    except (LoadError, ImportError) as error:
        reason = error.problem if isinstance(error, LoadError) else first_line(error)
        raise UsageError("--model", wanted, f"{model_id} ({reason})") from None
    model, processor = found
    if model.config.model_type != "florence2":
        raise UsageError("--model", wanted, f"{model_id}, a {type(model).__name__}")
    if processor is None:
        raise UsageError("--model", wanted, f"{model_id} (no processor lies in it)")
    inputs = processor(text=PROMPT, images=photo, return_tensors="pt").to(device)
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]

    def decode(tokens: Tensor) -> str:
        return str(processor.batch_decode(tokens[:1], skip_special_tokens=True)[0]).strip()

    return Workload(
        model=model,
        inputs=dict(inputs),
        settings=_settings(beams, new_tokens),
        facts={
            "model": Path(model_id).name,
            "weights": "real",
            **_facts(model, ids, model.config.image_token_id, pixels.shape[-1]),
        },
        decode=decode,
    )


def _settings(beams: int, new_tokens: int) -> dict[str, Any]:
    """Florence-2's own generation settings; every beam is returned, so every beam is compared."""
    settings: dict[str, Any] = {
        "num_beams": beams, "num_return_sequences": beams, "max_new_tokens": new_tokens,
        "do_sample": False, "no_repeat_ngram_size": 3,
    }  # fmt: skip
    return {**settings, "early_stopping": True} if beams > 1 else settings


def _facts(model: Any, ids: Tensor, image_token: int, size: int) -> dict[str, Any]:
    image_tokens = int((ids == image_token).sum())
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(ids.device.type),
        "attention": attentions.attention_of(model.config),
        "image_size": int(size),
        "image_tokens": image_tokens,
        "prompt_tokens": ids.shape[1] - image_tokens,
    }
