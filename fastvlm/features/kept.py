"""fastvlm.VisionFeatures: what a frozen vision tower makes of images, kept in a folder."""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.checks import choice, fail
from fastvlm.compat.versions import needs_newer_transformers
from fastvlm.decoding.images import opened, stacked
from fastvlm.features.batch import FEATURES, KEYS, OF, PIXELS, of_features, of_pixels
from fastvlm.features.collate import FeatureCollator
from fastvlm.features.identity import OP, differences, identity_of, structure_of, transform_of
from fastvlm.features.keys import from_tensor, picture_key, pixels_key
from fastvlm.features.shards import Shards
from fastvlm.features.store import SECONDS, Store
from fastvlm.features.tower import (
    PARTS,
    PROJECTOR,
    TOWER,
    Frozen,
    arithmetic,
    attach,
    detach,
    owner_of,
)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class VisionFeatures:
    """The outputs of a model's frozen vision tower, kept in a folder and read instead of computed.

    The model must not train its tower. The first time an image is seen the tower runs and its
    output is kept; from then on, in later epochs, runs, processes and for other tasks, it is
    read::

        features = fastvlm.VisionFeatures("features/", model, processor.image_processor)
        trainer = Trainer(model, arguments, features.collator(collate), dataset)

    folder: made where it is not there. It belongs to these weights, this transform and this
        arithmetic; anything else is refused with what differs. Any number of processes may read
        and fill it at once, and be killed.
    model: a Florence-2, Florenz or PaliGemma model, or what is around one; patched or not. Its
        tower takes a batch's kept features from here on (`detach` and `fastvlm.unpatch` end that).
    image_processor: of transformers; what pictures go through. None where all images come as
        pixel_values, whose own values are their key.
    dtype: in which features are kept, "bfloat16" (also "float16"), or "float32", with which losses
        and gradients are those of a run that keeps none. None: the folder's, "bfloat16" in a new
        one.
    part: the last part whose output is kept: "tower", or "projector" where that is frozen as well.
        None: the folder's, and in a new one "projector" if no parameter of both wants gradients.
    fill: whether to keep what is not there yet.

    What is kept is the output in evaluation: dropout and stochastic depth of a tower in training
    mode are left out (a warning says so). In the first epoch, too, a step computes with features as
    they are kept. A full disk is a warning, after which nothing more is kept.

    Picklable: the copies in the workers of a DataLoader find features, the model's process keeps
    new ones. ValueError, by argument: a folder of something else, weights that changed since, a
    tower that trains.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        image_processor: Any = None,
        *,
        dtype: str | None = None,
        part: str | None = None,
        fill: bool = True,
    ) -> None:
        if why := needs_newer_transformers("fastvlm.VisionFeatures"):
            raise ImportError(why)
        for name, value, allowed in (("dtype", dtype, _DTYPES), ("part", part, PARTS)):
            if value is not None:
                choice(OP, name, value, tuple(allowed))
        self.folder, self.image_processor = Path(folder), image_processor
        if self.folder.exists() and not self.folder.is_dir():
            raise fail(OP, "folder", "a folder, or one that is not there yet", str(folder))
        owner = owner_of(model)
        about = Shards(self.folder).about()
        told = about if about is not None else {}
        part = part or told.get("part") or ("tower" if _trains(owner) else "projector")
        dtype = dtype or told.get("dtype") or "bfloat16"
        if part not in PARTS or dtype not in _DTYPES:
            raise fail(OP, "folder", "one that this release of fastvlm knows", str(folder))
        self.part, self.dtype = part, dtype
        parts = {name: owner._modules[name] for name in PARTS[part]}
        identity = identity_of(parts, transform_of(image_processor), part, dtype)
        self.store = Store(self.folder, identity, fill)
        self._frozen: Frozen | None = Frozen(owner, part)
        self._owner: Any = weakref.ref(owner)
        attach(owner, self)
        atexit.register(_flush, weakref.ref(self))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_frozen": None, "_owner": None}

    def __len__(self) -> int:
        """How many images are kept, or wait to be written, as far as can be seen from here."""
        return len(self.store)

    # what stands in a batch

    def collator(self, collate: Callable[[Any], Any]) -> FeatureCollator:
        """collate, for ``collate_fn=`` and ``data_collator=``, with its pixel_values [images, 3, H,
        W] replaced by what `pixel_values` makes of them."""
        return FeatureCollator(self, collate)

    def pixel_values(self, images: Any, first: int = 0) -> dict[str, Any]:
        """What a batch holds in place of pixel_values: features, or pixels where one is missing.

        images: pixel_values [images, 3, H, W], or a list of paths, PIL images, uint8 arrays [H, W,
            3] and pixel_values [3, H, W], as for `fastvlm.caption`. Pictures whose features are
            kept are not transformed. The same may be given several times. first: the number of the
            first in messages.
        """
        named = opened(images, first)
        keys = [self.key(image) for image in named.values()]
        return self.of_keys(keys, lambda: stacked(named, self.image_processor))

    def of_keys(self, keys: Sequence[bytes], pixels: Callable[[], Tensor]) -> dict[str, Any]:
        """The same of images by their keys; pixels() is called where one is missing."""
        found = self.read(keys)
        return self.batch_of(pixels(), keys) if found is None else self.batch_of(found)

    def batch_of(self, rows: Tensor, keys: Sequence[bytes] = ()) -> dict[str, Any]:
        """The same of kept features, or, with their keys, of pixel_values."""
        return of_pixels(rows, keys) if keys else of_features(rows, self.store.of)

    def key(self, image: Any) -> bytes:
        """Of an image: pixel_values [3, H, W], or what goes through the image processor."""
        if isinstance(image, Tensor):
            return pixels_key(image)
        if self.image_processor is None:
            raise fail(OP, "image_processor", "given where images are no pixel_values", None)
        transform = transform_of(self.image_processor)
        if transform != self.store.identity["transform"]:
            wanted = "as it was when the features were begun, or have features of its own"
            raise fail(OP, "image_processor", wanted, self.image_processor)
        if (key := picture_key(image, transform)) is None:
            raise fail(OP, "an image", "a PIL image, an array or pixel_values [3, H, W]", image)
        return key

    def read(self, keys: Sequence[bytes]) -> Tensor | None:
        """The kept features of all of these, [images, ...]; None where one is missing, or where
        they were kept of images of several sizes."""
        rows = self.store.rows(keys)
        if not all(key in rows for key in keys):
            return None
        found = [rows[key] for key in keys]
        return torch.stack(found) if len({row.shape for row in found}) == 1 else None

    def processor_for(self, image_processor: Any, op: str) -> Any:
        """The image processor of a collator that has these features; its own must do the same."""
        if image_processor is None:
            return self.image_processor
        if transform_of(image_processor) != self.store.identity["transform"]:
            raise fail(op, "image_processor", "that of vision_features, or None", image_processor)
        return image_processor

    # the model's side

    def of_batch(self, given: Mapping[str, Any]) -> tuple[Tensor, bool]:
        """What the tower gives to its caller for one of `pixel_values`, and whether it has been
        through the projector as well."""
        frozen = self._checked()
        weight = next(frozen.modules()[TOWER].parameters())
        if FEATURES in given:
            if given[OF] != self.store.of:
                wanted = f"of {self.folder}, to which the model belongs"
                raise fail(OP, "features in pixel_values", wanted, "those of another folder")
            self._fits(arithmetic(weight))
            features = given[FEATURES]
        elif PIXELS in given and KEYS in given:
            features = self._computed(frozen, given[PIXELS], from_tensor(given[KEYS]), weight)
        else:
            wanted = "what VisionFeatures.pixel_values gives"
            raise fail(OP, "pixel_values", wanted, sorted(map(str, given)))
        self.store.flush(seconds=SECONDS)
        return features.to(weight.device, weight.dtype), self.part == "projector"

    def _checked(self) -> Frozen:
        frozen = self._frozen
        if frozen is None:
            raise ValueError(
                f"fastvlm.{OP}: this copy of a model takes kept features only after "
                "VisionFeatures(folder, model)"
            )
        frozen.check()
        identity = self.store.identity
        weights = frozen.changed(identity["weights"])
        now = {**identity, "weights": weights, "structure": structure_of(frozen.modules())}
        if now != identity:
            found = differences(identity, now)
            wanted = f"as it was when {self.folder} was opened"
            raise ValueError(
                f"fastvlm.{OP}: the vision tower must be {wanted}; its features were kept with "
                f"{'; '.join(found)}"
            )
        return frozen

    def _fits(self, here: torch.dtype) -> None:
        kept = self.store.arithmetic or _name(here)
        if kept not in (_name(here), "float32"):
            wanted = f"float32, or {kept} as when {self.folder} was filled"
            raise fail(OP, "the arithmetic of the tower (weights, autocast)", wanted, _name(here))

    def _computed(
        self, frozen: Frozen, pixels: Tensor, keys: list[bytes], weight: Tensor
    ) -> Tensor:
        """Of all images; the tower runs for those that are not there yet."""
        if len(keys) != pixels.shape[0]:
            raise fail(OP, KEYS, f"of one entry for each of {pixels.shape[0]} images", len(keys))
        here = arithmetic(weight)
        self._fits(here)
        rows = self.store.rows(keys)
        missing = list({key: i for i, key in enumerate(keys) if key not in rows}.items())
        if missing:
            # in float32 features that autocast would round are computed without it
            exact = self.store.arithmetic not in (None, _name(here))
            some = pixels[[i for _, i in missing]].to(weight.device, weight.dtype)
            new = _evaluated(frozen.modules(), some, exact).to(_DTYPES[self.dtype]).cpu()
            rows |= {key: row for (key, _), row in zip(missing, new, strict=True)}
            self.store.keep(dict(zip([key for key, _ in missing], new)), _name(here))
        return torch.stack([rows[key] for key in keys])

    def flush(self) -> None:
        """Write what waits to be written, which happens at 64 MiB, after a minute and at exit."""
        self.store.flush()

    def detach(self) -> None:
        """Write what waits, and let the model compute the features of all images again."""
        self.flush()
        owner = None if self._owner is None else self._owner()
        if owner is not None:
            detach(owner)


def features_of(
    features: VisionFeatures | str | os.PathLike[str] | None, model: Any, processor: Any
) -> VisionFeatures | None:
    """What a caller gives as features=: a folder stands for its features of this model."""
    if features is None or isinstance(features, VisionFeatures):
        return features
    return VisionFeatures(features, model, getattr(processor, "image_processor", None))


def _flush(ref: weakref.ref[VisionFeatures]) -> None:
    if (features := ref()) is not None:
        features.flush()


def _trains(owner: Any) -> bool:
    parts = (owner._modules[name] for name in (TOWER, PROJECTOR))
    return any(p.requires_grad for module in parts for p in module.parameters())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def _evaluated(parts: Mapping[str, nn.Module], pixels: Tensor, exact: bool) -> Tensor:
    """The output of the tower, or of it and the projector, as in evaluation."""
    modes = {m: m.training for module in parts.values() for m in module.modules()}
    kind = pixels.device.type
    off = torch.autocast(kind, enabled=False) if exact else contextlib.nullcontext()
    try:
        for module in parts.values():
            module.eval()
        with off:
            features: Tensor = parts[TOWER](pixels).last_hidden_state
            return parts[PROJECTOR](features) if PROJECTOR in parts else features
    finally:
        for module, mode in modes.items():
            module.training = mode
