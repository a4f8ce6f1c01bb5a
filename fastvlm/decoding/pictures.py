"""Picture files, as people have them, to RGB: turned, of 8 bits, or refused with a reason."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Iterator
from typing import IO, Any, cast

# Pillow's own limit: beyond it a file of a few bytes may ask for gigabytes
MOST_PIXELS = 178_956_970


class _Quiet:
    lock = threading.Lock()
    pictures = 0  # that are open now


# as warnings.filterwarnings("ignore", module=r"PIL\.") writes it
_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


@contextlib.contextmanager
def _pillow_is_quiet() -> Iterator[None]:
    """Within it no warning of Pillow's is shown, in any thread; everybody else's are.

    It warns of what is large and of metadata that is odd; the picture is what matters.
    warnings.catch_warnings puts all filters back as they were when it began: of two threads that
    open pictures the second would leave those of the first, and nothing would warn any more.
    """
    with _Quiet.lock:
        _Quiet.pictures += 1
        if _PILLOW not in warnings.filters:
            warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        yield
    finally:
        with _Quiet.lock:
            _Quiet.pictures -= 1
            # gone already where somebody's catch_warnings has put an older list back
            if _Quiet.pictures == 0 and _PILLOW in warnings.filters:
                cast("list[object]", warnings.filters).remove(_PILLOW)


class PictureError(ValueError):
    """A file that is no picture, or one that cannot be shown to a model; reason says why."""

    def __init__(self, text: str, reason: str | None = None) -> None:
        super().__init__(text)
        self.reason = text if reason is None else reason


def open_picture(file: str | Any | IO[bytes]) -> Any:
    """The first frame of a file (a path or an open binary file) as an RGB PIL image.

    PictureError: it cannot be read, is no picture that Pillow knows, is cut off, or has more than
    `MOST_PIXELS` pixels.
    """
    from PIL import Image

    try:
        with _pillow_is_quiet(), Image.open(file) as opened:
            return as_rgb(opened)
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(f"more than {MOST_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise PictureError("no image format that Pillow knows") from None
    except MemoryError:
        raise PictureError("too large for the memory that is left") from None
    except Exception as error:  # decoders raise SyntaxError, struct.error, … of a broken file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PictureError(" ".join(reason.split())) from error


def as_rgb(picture: Any) -> Any:
    """A PIL image as RGB: turned as its EXIF says; 16 bits scaled to 8; transparency is left out.

    PictureError: numbers that are not of 8 or 16 bits, whose range nobody knows; no pixels.
    """
    from PIL import ImageOps

    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise PictureError(f"{width} x {height}, more than {MOST_PIXELS:,} pixels")
    if width == 0 or height == 0:
        raise PictureError(f"{width} x {height} pixels")
    picture.load()
    if orientation(picture) in range(2, 9):
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        picture = _eight_bits(picture)
    return picture.convert("RGB")


def orientation(picture: Any) -> object:
    """How its EXIF says that a picture is to be turned, 1 to 8; None where it says nothing."""
    try:
        return picture.getexif().get(0x0112)
    except Exception:  # of metadata that is broken; the picture is not
        return None


def _eight_bits(picture: Any) -> Any:
    """Of one channel of whole numbers up to 65535, which convert() would cut off at 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise PictureError(f"mode {picture.mode}: numbers of neither 8 nor 16 bits")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
