"""Images as callers have them (files, pictures, arrays, pixel values) to one batch of pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvlm.checks import fail
from fastvlm.decoding.languages import OP

_WANTED = (
    "a path, a PIL image, a uint8 array [H, W, 3], or floating pixel_values [3, H, W], or a list "
    "of these, or pixel_values [images, 3, H, W]"
)


def to_pixels(images: Any, image_processor: Any) -> Tensor:
    """-> pixel_values [images, 3, H, W], on the CPU unless tensors from elsewhere were given.

    Pictures and paths go through image_processor(images=[...], return_tensors="pt"); floating
    tensors and arrays are pixel_values already. ValueError: no image, something else than an
    image, a file that is none, images of several sizes.
    """
    batch = isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4
    items = list(images) if batch or isinstance(images, (list, tuple)) else [images]
    if not items:
        raise fail(OP, "images", "one image or more", images)
    pixels = [_pixels(item, index, image_processor) for index, item in enumerate(items)]
    first = pixels[0]
    for index, other in enumerate(pixels):
        if other.shape != first.shape:
            wanted = f"of the size of images[0], {list(first.shape)}"
            raise fail(OP, f"images[{index}]", wanted, other)
    return torch.stack([one.to(first) for one in pixels])


def _pixels(image: Any, index: int, image_processor: Any) -> Tensor:
    """[3, H, W] of one image."""
    name = f"images[{index}]"
    if isinstance(image, np.ndarray) and image.dtype != np.uint8:
        image = torch.from_numpy(np.ascontiguousarray(image))
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise fail(OP, name, _WANTED, image)
        return image
    if image_processor is None:
        raise fail(OP, "processor", "one with an image_processor, or images pixel_values", None)
    batch = image_processor(images=[_picture(image, name)], return_tensors="pt")
    pixels: Tensor = batch["pixel_values"][0]
    return pixels


def _picture(image: Any, name: str) -> Any:
    from PIL import Image

    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as opened:
                return opened.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or "no image format that Pillow knows"
            raise ValueError(
                f"fastvlm.{OP}: {name} must be an image that can be read; got {str(image)!r} "
                f"({reason})"
            ) from error
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3:
            given = f"a uint8 array of shape {list(image.shape)}"
            raise ValueError(f"fastvlm.{OP}: {name} must be {_WANTED}; got {given}")
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise fail(OP, name, _WANTED, image)
    return image.convert("RGB")
