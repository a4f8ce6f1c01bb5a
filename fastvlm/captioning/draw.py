"""What an answer found, drawn into the picture: boxes, lines of writing, outlines, with labels."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastvlm.captioning.answers import Answer
from fastvlm.captioning.sources import Item
from fastvlm.captioning.tasks import Question
from fastvlm.decoding.pictures import open_picture

# told apart by people who see colours differently (Okabe and Ito's, without black)
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
# fonts that have most scripts; Pillow's own has Latin letters alone
_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "arial.ttf")


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    for name in _FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def finds(answer: Answer) -> bool:
    """Whether there is something to draw."""
    return bool(answer.boxes or answer.quads or answer.polygons)


def shapes(answer: dict[str, Any]) -> list[tuple[list[list[int]], str]]:
    """Of an answer's fields, for each thing its closed lines [x1, y1, x2, y2, …] and its label."""
    boxes = answer.get("boxes") or []
    things = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes]
    things += [[quad] for quad in answer.get("quads") or []]
    things += answer.get("polygons") or []
    labels = answer.get("labels") or []
    return [
        (lines, labels[index] if index < len(labels) else "") for index, lines in enumerate(things)
    ]


def draw(picture: Any, answers: Sequence[Answer]) -> Any:
    """A copy of an RGB PIL image with all that the answers found."""
    from PIL import ImageDraw

    drawn = picture.copy()
    pen = ImageDraw.Draw(drawn)
    width = max(1, round(min(drawn.size) / 200))
    font = _font(max(10, round(min(drawn.size) / 35)))
    found = [shape for answer in answers for shape in shapes(answer.fields())]
    for index, (lines, label) in enumerate(found):
        colour = COLOURS[index % len(COLOURS)]
        for line in lines:
            points = [(line[i], line[i + 1]) for i in range(0, len(line) - 1, 2)]
            if len(points) > 1:
                pen.line([*points, points[0]], fill=colour, width=width, joint="curve")
        if label and lines and len(lines[0]) > 1:
            _label(pen, label, lines[0], colour, font, drawn.size)
    return drawn


def _label(
    pen: Any, label: str, line: list[int], colour: str, font: Any, size: tuple[int, int]
) -> None:
    """Above the shape's upper left corner, or below it where the picture ends."""
    left, top = min(line[0::2]), min(line[1::2])
    x1, y1, x2, y2 = pen.textbbox((0, 0), label, font=font)
    width, height = x2 - x1 + 4, y2 - y1 + 4
    x = max(0, min(left, size[0] - width))
    y = top - height if top >= height else min(top, size[1] - height)
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    pen.text((x + 2 - x1, y + 2 - y1), label, fill="black", font=font)


class Drawings:
    """Writes DIR/<path>.jpg for each picture in which something was found."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path_of(self, item: Item) -> Path:
        # never outside of the folder, whatever a shard or an argument says
        parts = [part for part in Path(item.path).parts if part not in ("/", "..", "\\")]
        return self.folder.joinpath(*parts).with_name(parts[-1] + ".jpg")

    def __call__(self, item: Item, asked: Sequence[Question], answers: Sequence[Answer]) -> None:
        found = [answer for answer in answers if finds(answer)]
        if not found:
            return
        picture = draw(open_picture(io.BytesIO(item.read())), found)
        path = self.path_of(item)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        try:
            picture.save(new, "JPEG", quality=90)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
