"""What stands in a batch in place of pixel_values: kept features, or pixels and their images' keys.

A mapping, which loaders, trainers and Accelerate move and pin as they do a batch, and which no
tower without `VisionFeatures` takes for pixels: there it says what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastvlm.features.keys import to_tensor

FEATURES, OF = "features", "features_of"
PIXELS, KEYS = "pixel_values", "image_keys"


class InPlaceOfPixels(dict[str, Any]):
    """What stands in a batch. A model without its VisionFeatures looks for a tensor in it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"fastvlm.VisionFeatures: the model must have its VisionFeatures to take kept features "
            f"in place of pixel_values (a tensor's .{name} was asked for): make "
            "VisionFeatures(folder, model) after the model is loaded, and once more after "
            "fastvlm.unpatch(model) or detach()"
        )


def of_features(rows: Tensor, of: str) -> dict[str, Any]:
    """rows [images, ...], kept under this identity."""
    return InPlaceOfPixels({FEATURES: rows, OF: of})


def of_pixels(pixels: Tensor, keys: Sequence[bytes]) -> dict[str, Any]:
    """pixels [images, 3, H, W] whose features are to be computed, and kept under these keys."""
    return InPlaceOfPixels({PIXELS: pixels, KEYS: to_tensor(keys)})


def images_in(pixel_values: Tensor | Mapping[str, Any]) -> int:
    """How many images these are, in either form."""
    if isinstance(pixel_values, Tensor):
        return pixel_values.shape[0]
    rows: Tensor = pixel_values[FEATURES if FEATURES in pixel_values else PIXELS]
    return rows.shape[0]
