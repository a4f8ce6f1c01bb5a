"""The key of an image: a hash of what it is, wherever it lies and whatever it is called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvlm.decoding.pictures import orientation

BYTES = 32


def bytes_of(x: Tensor) -> Any:
    """The memory of a tensor's values in order, as something that can be hashed or written."""
    x = x.detach().cpu().contiguous()
    return x.reshape(-1).view(torch.uint8).numpy().data if x.numel() else b""


def pixels_key(pixels: Tensor) -> bytes:
    """Of pixel_values [3, H, W]: their dtype, shape and values."""
    head = f"pixel_values {pixels.dtype} {list(pixels.shape)} "
    return _digest(head, bytes_of(pixels))


def picture_key(picture: Any, transform: Any) -> bytes | None:
    """Of what a transform makes of a PIL image or an array; None of anything else.

    The transform as JSON can say it: another one makes other pixels, which may come to the same
    model. Of the picture its kind, size and values, and what else a transform may look at: palette,
    transparency, and how its EXIF says that it is to be turned.
    """
    how = json.dumps(transform, sort_keys=True)
    if isinstance(picture, np.ndarray):
        head = f"{how} array {picture.dtype} {picture.shape} "
        return _digest(head, np.ascontiguousarray(picture).reshape(-1).view(np.uint8).data)
    if not (hasattr(picture, "tobytes") and hasattr(picture, "mode")):
        return None
    info = picture.info.get("transparency")
    head = f"{how} picture {picture.mode} {picture.size} {orientation(picture)} {info!r} "
    palette = picture.getpalette("RGBA") if picture.mode in ("P", "PA") else ()
    return _digest(head, bytes(palette or ()), picture.tobytes())


def _digest(head: str, *values: Any) -> bytes:
    state = hashlib.blake2b(head.encode(), digest_size=BYTES)
    for one in values:
        state.update(one)
    return state.digest()


def to_tensor(keys: Iterable[bytes]) -> Tensor:
    """int64 [images, 4]: what may be split, pinned and moved like anything else in a batch."""
    rows = np.frombuffer(b"".join(keys), np.int64).reshape(-1, BYTES // 8)
    return torch.from_numpy(rows.copy())


def from_tensor(keys: Tensor) -> list[bytes]:
    return [row.tobytes() for row in keys.cpu().numpy()]
