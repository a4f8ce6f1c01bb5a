"""A collator around the user's own: features where pixel_values were."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlm.features.kept import VisionFeatures


class FeatureCollator:
    """collate, and of its batch the pixel_values by what was kept of them (`VisionFeatures`)."""

    def __init__(self, features: VisionFeatures, collate: Callable[[Any], Any]) -> None:
        self.features, self.collate = features, collate

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        if batch.get("pixel_values") is not None:
            batch["pixel_values"] = self.features.pixel_values(batch["pixel_values"])
        return batch
