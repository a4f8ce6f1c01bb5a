"""What stands in a batch in place of pixel_values: kept features, or pixels and their images' keys.

A mapping, which loaders, trainers and Accelerate move and pin as they do a batch, and which no
tower without `VisionFeatures` takes for pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastvlm.features.keys import to_tensor

FEATURES, OF = "features", "features_of"
PIXELS, KEYS = "pixel_values", "image_keys"


def of_features(rows: Tensor, of: str) -> dict[str, Any]:
    """rows [images, ...], kept under this identity."""
    return {FEATURES: rows, OF: of}


def of_pixels(pixels: Tensor, keys: Sequence[bytes]) -> dict[str, Any]:
    """pixels [images, 3, H, W] whose features are to be computed, and kept under these keys."""
    return {PIXELS: pixels, KEYS: to_tensor(keys)}


def images_in(pixel_values: Tensor | Mapping[str, Any]) -> int:
    """How many images these are, in either form."""
    if isinstance(pixel_values, Tensor):
        return pixel_values.shape[0]
    rows: Tensor = pixel_values[FEATURES if FEATURES in pixel_values else PIXELS]
    return rows.shape[0]
