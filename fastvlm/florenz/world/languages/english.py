"""English sentences of the small world."""

from __future__ import annotations

from fastvlm.florenz.world.scene import Group, Scene

CASES = ("plain",)
NOUNS = {
    "ball": ("ball", "balls"), "star": ("star", "stars"), "house": ("house", "houses"),
    "tree": ("tree", "trees"), "boat": ("boat", "boats"), "fish": ("fish", "fish"),
    "cup": ("cup", "cups"), "flower": ("flower", "flowers"), "car": ("car", "cars"),
    "heart": ("heart", "hearts"), "hat": ("hat", "hats"), "mushroom": ("mushroom", "mushrooms"),
}  # fmt: skip
NUMBERS = ("two", "three", "four")
RELATIONS = {
    "left of": "to the left of", "right of": "to the right of", "above": "above",
    "below": "below",
}  # fmt: skip
PLACES = {
    "meadow": "on a meadow", "beach": "on a beach", "snow": "in the snow",
    "street": "on a street", "night": "under the night sky",
}  # fmt: skip


def noun_phrase(group: Group, case: str) -> str:
    words = [group.size] if group.size else []
    words += [group.colour, NOUNS[group.kind][group.count > 1]]
    article = "an" if words[0][0] in "aeiou" else "a"
    number = article if group.count == 1 else NUMBERS[group.count - 2]
    return " ".join([number, *words])


def sentence(scene: Scene, frame: str) -> str:
    words = {
        "shows": "The image shows",
        "exists": "There is" if scene.first.count == 1 else "There are",
        "seen": "You can see",
    }[frame]
    parts = [words, noun_phrase(scene.first, "plain")]
    if scene.second is not None and scene.relation is not None:
        parts += [RELATIONS[scene.relation], noun_phrase(scene.second, "plain")]
    if scene.place is not None:
        parts.append(PLACES[scene.place])
    return " ".join(parts) + "."
