"""What a picture of the small world shows: groups of things, how they lie, and where."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from fastvlm.checks import choice, fail

KINDS = (
    "ball", "star", "house", "tree", "boat", "fish", "cup", "flower", "car", "heart", "hat",
    "mushroom",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple")
SIZES = ("small", "big")
MOST = 4
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = ("meadow", "beach", "snow", "street", "night")
_OP = "florenz.world.Scene"


@dataclass(frozen=True)
class Group:
    """Equal things: count (1 to 4) of a kind, of one colour, and of a size where one is told.

    ValueError: a count, size, colour or kind that the world does not have.
    """

    count: int
    size: str | None
    colour: str
    kind: str

    def __post_init__(self) -> None:
        if type(self.count) is not int or not 1 <= self.count <= MOST:
            raise fail(_OP, "count", f"a whole number from 1 to {MOST}", self.count)
        if self.size is not None:
            choice(_OP, "size", self.size, SIZES)
        choice(_OP, "colour", self.colour, COLOURS)
        choice(_OP, "kind", self.kind, KINDS)


@dataclass(frozen=True)
class Scene:
    """A group, perhaps a second one that it lies beside, and perhaps a place.

    relation: where first lies as seen from second; both or neither. ValueError: one without the
    other, or a name that the world does not have.
    """

    first: Group
    relation: str | None = None
    second: Group | None = None
    place: str | None = None

    def __post_init__(self) -> None:
        if (self.relation is None) != (self.second is None):
            raise fail(_OP, "relation", "given with second, or not at all", self.relation)
        if self.relation is not None:
            choice(_OP, "relation", self.relation, RELATIONS)
        if self.place is not None:
            choice(_OP, "place", self.place, PLACES)

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def mirrored(self) -> Scene:
        """The same, told from the other group: a picture does not say which one comes first."""
        if self.second is None or self.relation is None:
            return self
        return Scene(self.second, OPPOSITE[self.relation], self.first, self.place)


def number_of_scenes() -> int:
    """How many different scenes there are."""
    groups = MOST * (1 + len(SIZES)) * len(COLOURS) * len(KINDS)
    # two groups differ in kind: what is told apart must look different
    others = groups - groups // len(KINDS)
    return groups * (1 + len(RELATIONS) * others) * (1 + len(PLACES))


@dataclass(frozen=True)
class Variety:
    """How much of the world is drawn: the first so many kinds, up to so many equal things, and the
    shares of scenes with a second group and with a place. Default: all of it.

    ValueError: fewer than two kinds, a number or a share beyond what there is.
    """

    kinds: int = len(KINDS)
    most: int = MOST
    second: float = 0.5
    place: float = 0.5

    def __post_init__(self) -> None:
        op = "florenz.world.Variety"
        for name, least, limit in (("kinds", 2, len(KINDS)), ("most", 1, MOST)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= limit:
                raise fail(op, name, f"a whole number from {least} to {limit}", value)
        for name in ("second", "place"):
            if not 0 <= getattr(self, name) <= 1:
                raise fail(op, name, "a share from 0 to 1", getattr(self, name))


ALL = Variety()


def draw_group(draw: random.Random, *, without: str | None = None, variety: Variety = ALL) -> Group:
    """A random group; without: a kind that it may not be of."""
    return Group(
        draw.choices(range(1, variety.most + 1), weights=(8, 4, 2, 1)[: variety.most])[0],
        draw.choice((None, *SIZES)),
        draw.choice(COLOURS),
        draw.choice([kind for kind in KINDS[: variety.kinds] if kind != without]),
    )


def draw_scene(draw: random.Random, variety: Variety = ALL) -> Scene:
    """A random scene: half of them have two groups, half of them a place, unless variety says so
    otherwise."""
    first = draw_group(draw, variety=variety)
    scene = Scene(first, place=draw.choice(PLACES) if draw.random() < variety.place else None)
    if draw.random() >= variety.second:
        return scene
    second = draw_group(draw, without=first.kind, variety=variety)
    return replace(scene, relation=draw.choice(RELATIONS), second=second)


def related_scene(scene: Scene, draw: random.Random, variety: Variety = ALL) -> Scene:
    """A scene that shares one group with scene and nothing else on purpose.

    Such is a sentence that a search for the nearest text finds for a picture (arXiv 2503.09443,
    section 2): about the same thing, and seldom about the same picture.
    """
    shared, other = draw.choice(scene.groups), draw_scene(draw, variety)
    if other.second is None:
        return replace(other, first=shared)
    second = draw_group(draw, without=shared.kind, variety=variety)
    if draw.random() < 0.5:
        return replace(other, first=shared, second=second)
    return replace(other, first=second, second=shared)
