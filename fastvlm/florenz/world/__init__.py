"""A small world: scenes, pictures of them, and sentences about them in six languages.

It needs no network and no data set. A scene is drawn with Pillow, told by a grammar of real words,
and a caption is right or wrong by reading it back. With it the whole of arXiv 2503.09443 runs in
small: captions in English and German alone, translations into all six languages.
"""

from fastvlm.florenz.world.draw import draw
from fastvlm.florenz.world.grammar import PREFIXES, Reading, language_of, read, sentence
from fastvlm.florenz.world.scene import (
    Group,
    Scene,
    Variety,
    draw_scene,
    number_of_scenes,
    related_scene,
)

__all__ = [
    "PREFIXES",
    "Group",
    "Reading",
    "Scene",
    "Variety",
    "draw",
    "draw_scene",
    "language_of",
    "number_of_scenes",
    "read",
    "related_scene",
    "sentence",
]
