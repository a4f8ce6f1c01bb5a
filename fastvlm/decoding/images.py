"""Images as callers have them (files, pictures, arrays, pixel values) to one batch of pixels."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastvlm.checks import fail
from fastvlm.decoding.languages import OP
from fastvlm.decoding.pictures import PictureError, as_rgb, open_picture

if TYPE_CHECKING:
    from PIL import Image

    Picture: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
    Images: TypeAlias = Picture | list[Any] | tuple[Any, ...]

_WANTED = (
    "a path, a PIL image, a uint8 array [H, W, 3], or floating pixel_values [3, H, W], or a list "
    "of these, or pixel_values [images, 3, H, W]"
)


def is_stream(images: Any) -> bool:
    """Whether images are read one after the other: an iterable, and none of the forms above."""
    known = isinstance(images, (str, os.PathLike, Tensor, np.ndarray, list, tuple))
    # a PIL image has no iterator
    return not known and isinstance(images, Iterable)


def to_pixels(images: Any, image_processor: Any, first: int = 0) -> Tensor:
    """-> pixel_values [images, 3, H, W], on the CPU unless tensors from elsewhere were given.

    Pictures and paths go through image_processor(images=[...], return_tensors="pt"); floating
    tensors and arrays are pixel_values already. first: the number of the first in messages.
    ValueError: no image, something else than an image, a file that is none, images of several
    sizes.
    """
    return stacked(opened(images, first), image_processor)


def opened(images: Any, first: int = 0) -> dict[str, Any]:
    """Each of the images as `as_image` gives it, by its name in messages."""
    batch = isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4
    items = list(images) if batch or isinstance(images, (list, tuple)) else [images]
    if not items:
        raise fail(OP, "images", "one image or more", images)
    names = [f"images[{first + index}]" for index in range(len(items))]
    return {name: as_image(item, name) for name, item in zip(names, items)}


def stacked(images: dict[str, Any], image_processor: Any) -> Tensor:
    """pixel_values [images, 3, H, W] of `opened` images. ValueError: they are of several sizes."""
    pixels = {name: pixels_of(image, image_processor) for name, image in images.items()}
    name, wanted = next(iter(pixels.items()))
    for other, one in pixels.items():
        if one.shape != wanted.shape:
            raise fail(OP, other, f"of the size of {name}, {list(wanted.shape)}", one)
    return torch.stack([one.to(wanted) for one in pixels.values()])


def pixels_of(image: Any, image_processor: Any) -> Tensor:
    """[3, H, W] of one result of `as_image`."""
    if isinstance(image, Tensor):
        return image
    if image_processor is None:
        raise fail(OP, "processor", "one with an image_processor, or images pixel_values", None)
    pixels: Tensor = image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    return pixels


def as_image(image: Any, name: str) -> Any:
    """One image in any of its forms: an RGB PIL image, or pixel_values [3, H, W]."""
    if isinstance(image, np.ndarray) and image.dtype != np.uint8:
        image = torch.from_numpy(np.ascontiguousarray(image))
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise fail(OP, name, _WANTED, image)
        return image
    return _picture(image, name)


def _picture(image: Any, name: str) -> Any:
    from PIL import Image

    if isinstance(image, (str, os.PathLike)):
        try:
            return open_picture(image)
        except PictureError as error:
            raise PictureError(
                f"fastvlm.{OP}: {name} must be an image that can be read; got {str(image)!r} "
                f"({error.reason})",
                error.reason,
            ) from error
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3:
            given = f"a uint8 array of shape {list(image.shape)}"
            raise ValueError(f"fastvlm.{OP}: {name} must be {_WANTED}; got {given}")
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise fail(OP, name, _WANTED, image)
    try:
        return as_rgb(image)
    except (PictureError, OSError) as error:
        raise PictureError(
            f"fastvlm.{OP}: {name} must be an image that can be read ({error})", str(error)
        ) from error
