"""What the demo and the end-to-end benchmark run: a photo, a prompt, a Florence-2, generate()."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    Florence2Config,
    Florence2ForConditionalGeneration,
)

from fastvlm.compat import hf
from fastvlm.decoding.pictures import PictureError, open_picture
from fastvlm.demo.arguments import UsageError
from fastvlm.loading.errors import LoadError, first_line
from fastvlm.loading.load import load
from fastvlm.loading.processors import IMAGE_MEAN, IMAGE_STD

# what Florence-2's preprocessor_config.json says
IMAGE_SIZE = 768
DEFAULT_PHOTO = "astronaut.png"
PROMPT = "<CAPTION>"  # Florence-2's processor turns it into "What does the image describe?"
PROMPT_TOKENS = 16
SEED = 0


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


def load_photo(path: str | None) -> tuple[Image.Image, str]:
    """An RGB photo and its file name; the default ships inside scikit-image's wheel."""
    if path is None:
        import skimage

        path = str(Path(skimage.__file__).parent / "data" / DEFAULT_PHOTO)
    try:
        return open_picture(path), Path(path).name
    except PictureError as error:
        given = f"{path} ({error.reason})"
        raise UsageError("--image", "an image that Pillow can read", given) from None


def to_pixels(photo: Image.Image, size: int) -> Tensor:
    """As Florence-2's own preprocessor: bicubic resize without a crop, scaled, normalized."""
    resized = photo.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)
    normalized = (pixels - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    return normalized.permute(2, 0, 1)[None].contiguous()


def florence2_base() -> Florence2Config:
    """Florence-2-base, 231M parameters, as microsoft/Florence-2-base: vocabulary 51289."""
    return _config(768, 6, 12, 3072, 51289, {})


def florence2_large() -> Florence2Config:
    """Florence-2-large, 776M parameters, as microsoft/Florence-2-large."""
    vision = {
        "embed_dim": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64),
        "num_groups": (8, 16, 32, 64),
    }  # fmt: skip
    return _config(1024, 12, 16, 4096, 51289, vision)


def small() -> Florence2Config:
    """The same structure, tiny: for tests."""
    vision = {
        "embed_dim": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2), "num_groups": (1, 1, 2, 2),
        "depths": (1, 1, 1, 1), "window_size": 6,
    }  # fmt: skip
    return _config(64, 2, 4, 128, 512, vision)


def _config(
    width: int, layers: int, heads: int, hidden: int, vocabulary: int, vision: dict[str, Any]
) -> Florence2Config:
    text: dict[str, Any] = {
        "model_type": "bart", "vocab_size": vocabulary, "d_model": width, "dropout": 0.1,
        "max_position_embeddings": 1024, "scale_embedding": False,
    }  # fmt: skip
    for stack in ("encoder", "decoder"):
        text[f"{stack}_layers"] = layers
        text[f"{stack}_attention_heads"] = heads
        text[f"{stack}_ffn_dim"] = hidden
    return Florence2Config(
        text_config=text,
        vision_config={"projection_dim": width, **vision},
        image_token_id=vocabulary - 1,
    )


def random_model(config: Florence2Config) -> Any:
    """A model with random weights from a fixed seed whose tokens vary and depend on the image.

    At the usual initialization (std 0.02) attention is uniform and the layers nearly the identity:
    the model repeats its last token and hardly looks at the photo, so that wrong kernels could
    still give the right tokens. Sharper attention, stronger MLPs and louder positions make each
    token depend on the image, the position and the history, and the beams change places.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Florence2ForConditionalGeneration(config).eval()
        language = model.model.language_model
        with torch.no_grad():
            for name, module in language.named_modules():
                if isinstance(module, nn.Linear):
                    kind = name.rpartition(".")[2]
                    gain = 0.5 if kind in ("v_proj", "out_proj") else 2.0
                    module.weight.normal_(0, gain * module.in_features**-0.5)
            language.shared.weight.normal_(0, 0.1)
            language.decoder.embed_positions.weight.normal_(0, 0.1)
            language.encoder.embed_positions.weight.normal_(0, 1.0)
    return model


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
        "attention": hf.attention_of(model.config),
        "image_size": int(size),
        "image_tokens": image_tokens,
        "prompt_tokens": ids.shape[1] - image_tokens,
    }
