"""Picture files as people have them: seen rightly, or refused with a reason, by every way in."""

from __future__ import annotations

import io
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import encoded, noise
from PIL import Image
from speakers import speaker

from fastvlm.decoding.images import to_pixels
from fastvlm.decoding.pictures import PictureError, as_rgb, open_picture
from fastvlm.loading import random_florence2
from fastvlm.usage import UsageError


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    upright = noise(1)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.png"
        upright.save(path, exif=exif)
        seen = np.asarray(open_picture(path))
        stored = np.asarray(upright)
        flips = {
            1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
            5: stored.transpose(1, 0, 2), 6: stored[::-1].transpose(1, 0, 2),
            7: stored[::-1, ::-1].transpose(1, 0, 2), 8: stored[:, ::-1].transpose(1, 0, 2),
        }  # fmt: skip
        assert np.array_equal(seen, flips[orientation])
        # by path and as a PIL image it is the same picture
        take = speaker("florence2").processor.image_processor
        with Image.open(path) as opened:
            assert torch.equal(to_pixels(opened, take), to_pixels(path, take))
            assert opened.size == upright.size


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path: Path) -> None:
    values = (np.arange(256, dtype=np.uint32) * 257).reshape(16, 16)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "32.tif")
    for name in ("16.png", "32.tif"):
        seen = np.asarray(open_picture(tmp_path / name))
        assert np.array_equal(seen[..., 0].ravel(), np.arange(256))
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(PictureError, match="mode F: numbers of neither 8 nor 16 bits"):
        open_picture(tmp_path / "float.tif")


def test_odd_modes_are_rgb(tmp_path: Path) -> None:
    picture = noise(2)
    frames = [noise(seed) for seed in (5, 6, 7)]
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    picture.convert("P").save(tmp_path / "palette.gif")
    picture.convert("1").save(tmp_path / "bits.png")
    picture.convert("LA").save(tmp_path / "gray.png")
    frames[0].save(tmp_path / "animated.png", save_all=True, append_images=frames[1:])
    for path in sorted(tmp_path.iterdir()):
        seen = open_picture(path)
        assert (seen.mode, seen.size) == ("RGB", picture.size)
    assert open_picture(tmp_path / "animated.png").tobytes() == frames[0].tobytes()
    assert open_picture(tmp_path / "alpha.png").tobytes() == picture.tobytes()


def broken(folder: Path) -> dict[str, str]:
    """Files that cannot be read, by name, and what is said of them."""
    whole = encoded(noise(1, 300, 300), "JPEG")
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "words.png").write_bytes(b"this is no picture")
    png = bytearray(encoded(noise(1)))
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    png[60] ^= 0xFF
    (folder / "flipped.png").write_bytes(png)
    # what a bomb is: a header that asks for a thousand times the memory of its bytes
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    return {
        "cut.jpg": "truncated", "empty.jpg": "no image format", "words.png": "no image format",
        "cut.png": "truncated", "flipped.png": ".", "huge.png": "more than 178,956,970 pixels",
    }  # fmt: skip


def test_broken_files_are_refused_with_a_reason(tmp_path: Path) -> None:
    for name, reason in broken(tmp_path).items():
        with pytest.raises(PictureError, match=reason) as told:
            open_picture(tmp_path / name)
        assert told.value.reason
    with pytest.raises(PictureError, match="No such file"):
        open_picture(tmp_path / "missing.png")
    with pytest.raises(PictureError, match="0 x 5 pixels"):
        as_rgb(Image.new("RGB", (0, 5)))


def test_broken_metadata_is_no_reason(tmp_path: Path) -> None:
    data = bytearray(encoded(noise(1), "JPEG"))
    exif = b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    (tmp_path / "a.jpg").write_bytes(data[:2] + segment + data[2:])
    assert open_picture(tmp_path / "a.jpg").size == (50, 40)


class Slow(io.BytesIO):
    """A file that says when it is read, and waits then."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def read(self, size: int | None = -1) -> bytes:
        self.begun.set()
        assert self.go_on.wait(60)
        return super().read(size)


def test_threads_that_open_pictures_leave_the_warnings_of_all_others(
    recwarn: pytest.WarningsRecorder,
) -> None:
    """The second begins before the first ends, and ends after it."""
    before = list(warnings.filters)
    files = [Slow(encoded(noise(seed))) for seed in (1, 2)]
    threads = [threading.Thread(target=open_picture, args=(file,)) for file in files]
    for thread, file in zip(threads, files):
        thread.start()
        assert file.begun.wait(60)
    warnings.warn("while both are open", UserWarning, stacklevel=1)
    for thread, file in zip(threads, files):
        file.go_on.set()
        thread.join()
    warnings.warn("when both are closed", UserWarning, stacklevel=1)
    said = [str(one.message) for one in recwarn]
    assert said == ["while both are open", "when both are closed"]
    assert list(warnings.filters) == before


def test_what_pillow_warns_of_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    picture = Image.new("RGB", (9, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_picture(io.BytesIO(encoded(picture)))
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(io.BytesIO(encoded(picture)))


def test_no_photo_and_none_of_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip install 'fastvlm[caption]' brings none."""
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UsageError, match="--image wants a photo; pip install scikit-image"):
        random_florence2.load_photo(None)
