"""Pictures of scenes, by Pillow: flat shapes with outlines on a plain ground."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from fastvlm.checks import fail
from fastvlm.florenz.world.scene import Group, Scene

Point = tuple[float, float]
INK = (40, 40, 40)
PAINT = {
    "red": (214, 40, 40), "blue": (38, 84, 204), "green": (22, 128, 48), "yellow": (250, 214, 20),
    "black": (12, 12, 12), "white": (255, 255, 255), "orange": (245, 130, 12),
    "purple": (132, 40, 160),
}  # fmt: skip
# sky, ground, and how far down the ground begins
GROUNDS = {
    None: ((222, 222, 226), (222, 222, 226), 1.0),
    "meadow": ((205, 230, 250), (170, 222, 140), 0.3),
    "beach": ((190, 230, 250), (240, 222, 170), 0.3),
    "snow": ((200, 210, 224), (240, 246, 252), 0.3),
    "street": ((214, 218, 222), (150, 150, 156), 0.3),
    "night": ((52, 56, 104), (86, 92, 120), 0.75),
}
# the side of a thing, of the picture's: two big ones fit into half of it
SHARES = {None: 0.18, "small": 0.13, "big": 0.22}
_APART = 1.06
_SUPERSAMPLED = 4


class _Pen:
    """Draws in the unit square around a centre."""

    def __init__(self, canvas: Any, centre: Point, side: float, colour: tuple[int, int, int]):
        self.canvas, self.centre, self.side, self.colour = canvas, centre, side, colour
        self.line = max(1, round(side / 22))

    def at(self, x: float, y: float) -> Point:
        """(-1, -1) is the upper left corner of the thing, (1, 1) the lower right one."""
        return self.centre[0] + x * self.side / 2, self.centre[1] + y * self.side / 2

    def ellipse(self, left: float, top: float, right: float, bottom: float, **kinds: Any) -> None:
        box = [*self.at(left, top), *self.at(right, bottom)]
        self.canvas.ellipse(
            box, **{"fill": self.colour, "outline": INK, "width": self.line, **kinds}
        )

    def polygon(self, *points: Point, **kinds: Any) -> None:
        places = [self.at(*point) for point in points]
        self.canvas.polygon(places, fill=kinds.get("fill", self.colour))
        self.canvas.line([*places, places[0]], fill=INK, width=self.line, joint="curve")

    def lines(self, *points: Point) -> None:
        self.canvas.line(
            [self.at(*p) for p in points], fill=INK, width=2 * self.line, joint="curve"
        )


def _ball(pen: _Pen) -> None:
    pen.ellipse(-0.9, -0.9, 0.9, 0.9)


def _star(pen: _Pen) -> None:
    turns = [(math.pi * (n / 5 - 0.5), 1.0 if n % 2 == 0 else 0.42) for n in range(10)]
    pen.polygon(*((r * math.cos(a), r * math.sin(a)) for a, r in turns))


def _house(pen: _Pen) -> None:
    pen.polygon((-0.7, -0.1), (0.7, -0.1), (0.7, 0.95), (-0.7, 0.95))
    pen.polygon((-0.95, -0.1), (0, -0.95), (0.95, -0.1))
    pen.polygon((-0.2, 0.35), (0.2, 0.35), (0.2, 0.95), (-0.2, 0.95), fill=INK)


def _tree(pen: _Pen) -> None:
    pen.polygon((-0.14, 0.3), (0.14, 0.3), (0.14, 0.98), (-0.14, 0.98), fill=(120, 80, 40))
    pen.polygon((0, -1), (0.75, 0.4), (-0.75, 0.4))


def _boat(pen: _Pen) -> None:
    pen.lines((0, -0.95), (0, 0.3))
    pen.polygon((0.08, -0.85), (0.8, 0.15), (0.08, 0.15))
    pen.polygon((-0.95, 0.3), (0.95, 0.3), (0.6, 0.85), (-0.6, 0.85))


def _fish(pen: _Pen) -> None:
    pen.polygon((0.35, 0), (0.98, -0.5), (0.98, 0.5))
    pen.ellipse(-0.98, -0.5, 0.55, 0.5)
    pen.ellipse(-0.7, -0.2, -0.5, 0, fill=INK)


def _cup(pen: _Pen) -> None:
    pen.ellipse(0.3, -0.35, 0.98, 0.35, fill=None, width=3 * pen.line)
    pen.polygon((-0.8, -0.7), (0.6, -0.7), (0.4, 0.8), (-0.6, 0.8))


def _flower(pen: _Pen) -> None:
    pen.lines((0, 0), (0, 0.98))
    for turn in range(5):
        x, y = 0.36 * math.cos(turn * 1.2566), 0.36 * math.sin(turn * 1.2566) - 0.34
        pen.ellipse(x - 0.28, y - 0.28, x + 0.28, y + 0.28)
    pen.ellipse(-0.18, -0.52, 0.18, -0.16, fill=(120, 80, 40))


def _car(pen: _Pen) -> None:
    pen.polygon((-0.5, -0.1), (-0.3, -0.6), (0.35, -0.6), (0.6, -0.1))
    pen.polygon((-0.98, -0.1), (0.98, -0.1), (0.98, 0.45), (-0.98, 0.45))
    for x in (-0.55, 0.55):
        pen.ellipse(x - 0.24, 0.2, x + 0.24, 0.68, fill=INK)


def _heart(pen: _Pen) -> None:
    turns = [2 * math.pi * n / 40 for n in range(40)]
    pen.polygon(
        *(
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
                / 16,
            )
            for t in turns
        )
    )


def _hat(pen: _Pen) -> None:
    pen.polygon((-0.5, -0.7), (0.5, -0.7), (0.5, 0.4), (-0.5, 0.4))
    pen.polygon((-0.98, 0.4), (0.98, 0.4), (0.98, 0.62), (-0.98, 0.62))


def _mushroom(pen: _Pen) -> None:
    pen.polygon((-0.25, 0), (0.25, 0), (0.35, 0.95), (-0.35, 0.95), fill=(246, 238, 220))
    arc = [(math.cos(math.pi * (1 + n / 16)), math.sin(math.pi * (1 + n / 16))) for n in range(17)]
    pen.polygon(*((0.95 * x, 0.95 * y + 0.1) for x, y in arc))


SHAPES: dict[str, Callable[[_Pen], None]] = {
    "ball": _ball, "star": _star, "house": _house, "tree": _tree, "boat": _boat, "fish": _fish,
    "cup": _cup, "flower": _flower, "car": _car, "heart": _heart, "hat": _hat,
    "mushroom": _mushroom,
}  # fmt: skip
# where the middle of the first group lies, and that of the second, across and down
_MIDDLES = {
    None: ((0.5, 0.5), (0.5, 0.5)),
    "left of": ((0.26, 0.5), (0.74, 0.5)),
    "right of": ((0.74, 0.5), (0.26, 0.5)),
    "above": ((0.5, 0.26), (0.5, 0.74)),
    "below": ((0.5, 0.74), (0.5, 0.26)),
}


def draw(scene: Scene, size: int = 224, *, seed: int = 0) -> Any:
    """A picture of a scene: an RGB image of Pillow, size x size pixels.

    seed: where exactly the things lie. ValueError: a size below 16.
    """
    from PIL import Image, ImageDraw

    if type(size) is not int or size < 16:
        raise fail("florenz.world.draw", "size", "a whole number, 16 or more", size)
    side, chance = size * _SUPERSAMPLED, random.Random(seed)
    sky, ground, horizon = GROUNDS[scene.place]
    image = Image.new("RGB", (side, side), sky)
    canvas = ImageDraw.Draw(image)
    if horizon < 1:
        canvas.rectangle([0, horizon * side, side, side], fill=ground)
    first, second = _MIDDLES[scene.relation]
    _draw_group(canvas, scene.first, first, side, scene.relation, chance)
    if scene.second is not None:
        _draw_group(canvas, scene.second, second, side, scene.relation, chance)
    return image.reduce(_SUPERSAMPLED)


def _draw_group(
    canvas: Any,
    group: Group,
    middle: Point,
    side: int,
    relation: str | None,
    chance: random.Random,
) -> None:
    """The things of a group around its middle; two stand across the line to the other group."""
    thing = SHARES[group.size]
    slack = thing * (_APART - 1) / 2
    for right, down in _places(group.count, relation in ("left of", "right of")):
        x = middle[0] + right * thing * _APART + chance.uniform(-slack, slack)
        y = middle[1] + down * thing * _APART + chance.uniform(-slack, slack)
        pen = _Pen(canvas, (x * side, y * side), thing * side, PAINT[group.colour])
        SHAPES[group.kind](pen)


def _places(count: int, upright: bool) -> list[Point]:
    """Where equal things stand around a middle, in units of their side."""
    if count == 1:
        return [(0, 0)]
    if count == 2:
        return [(0, -0.5), (0, 0.5)] if upright else [(-0.5, 0), (0.5, 0)]
    if count == 3:
        return [(-0.5, -0.5), (0.5, -0.5), (0, 0.5)]
    return [(-0.5, -0.5), (0.5, -0.5), (-0.5, 0.5), (0.5, 0.5)]
