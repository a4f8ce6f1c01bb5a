"""A Florence-2 of random weights, and a photo: what `caption` and `check` run without --model."""

from __future__ import annotations

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

from fastvlm.decoding.pictures import PictureError, open_picture
from fastvlm.loading.processors import IMAGE_MEAN, IMAGE_STD
from fastvlm.usage import UsageError

# what Florence-2's preprocessor_config.json says
IMAGE_SIZE = 768
DEFAULT_PHOTO = "astronaut.png"
SEED = 0


def load_photo(path: str | None) -> tuple[Image.Image, str]:
    """An RGB photo and its file name; the default ships inside scikit-image's wheel."""
    if path is None:
        try:
            import skimage
        except ModuleNotFoundError:
            wanted = "a photo; pip install scikit-image brings the one that is taken without it"
            raise UsageError("--image", wanted, "none") from None
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
