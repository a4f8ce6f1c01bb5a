"""German sentences of the small world: three genders, three cases, mixed and strong adjectives."""

from __future__ import annotations

from fastvlm.florenz.world.scene import Group, Scene

CASES = ("accusative", "dative")
# gender, singular, dative singular, plural, dative plural
NOUNS = {
    "ball": ("m", "Ball", "Ball", "Bälle", "Bällen"),
    "star": ("m", "Stern", "Stern", "Sterne", "Sternen"),
    "house": ("n", "Haus", "Haus", "Häuser", "Häusern"),
    "tree": ("m", "Baum", "Baum", "Bäume", "Bäumen"),
    "boat": ("n", "Boot", "Boot", "Boote", "Booten"),
    "fish": ("m", "Fisch", "Fisch", "Fische", "Fischen"),
    "cup": ("f", "Tasse", "Tasse", "Tassen", "Tassen"),
    "flower": ("f", "Blume", "Blume", "Blumen", "Blumen"),
    "car": ("n", "Auto", "Auto", "Autos", "Autos"),
    "heart": ("n", "Herz", "Herzen", "Herzen", "Herzen"),
    "hat": ("m", "Hut", "Hut", "Hüte", "Hüten"),
    "mushroom": ("m", "Pilz", "Pilz", "Pilze", "Pilzen"),
}
STEMS = {
    "red": "rot", "blue": "blau", "green": "grün", "yellow": "gelb", "black": "schwarz",
    "white": "weiß", "orange": "orangefarben", "purple": "violett", "small": "klein",
    "big": "groß",
}  # fmt: skip
NUMBERS = ("zwei", "drei", "vier")
ARTICLES = {
    "accusative": {"m": "einen", "f": "eine", "n": "ein"},
    "dative": {"m": "einem", "f": "einer", "n": "einem"},
}
# of an adjective after ein, and of one after a number
SINGULAR = {
    "accusative": {"m": "en", "f": "e", "n": "es"},
    "dative": {"m": "en", "f": "en", "n": "en"},
}
PLURAL = {"accusative": "e", "dative": "en"}
RELATIONS = {
    "left of": "links von", "right of": "rechts von", "above": "über", "below": "unter"
}  # fmt: skip
PLACES = {
    "meadow": "auf einer Wiese", "beach": "am Strand", "snow": "im Schnee",
    "street": "auf einer Straße", "night": "unter dem Nachthimmel",
}  # fmt: skip
FRAMES = {"shows": "Das Bild zeigt", "exists": "Es gibt", "seen": "Man sieht"}


def noun_phrase(group: Group, case: str) -> str:
    gender, singular, dative, plural, dative_plural = NOUNS[group.kind]
    one = group.count == 1
    ending = SINGULAR[case][gender] if one else PLURAL[case]
    adjectives = [STEMS[word] + ending for word in (group.size, group.colour) if word]
    if one:
        noun = singular if case == "accusative" else dative
        return " ".join([ARTICLES[case][gender], *adjectives, noun])
    noun = plural if case == "accusative" else dative_plural
    return " ".join([NUMBERS[group.count - 2], *adjectives, noun])


def sentence(scene: Scene, frame: str) -> str:
    parts = [FRAMES[frame], noun_phrase(scene.first, "accusative")]
    if scene.second is not None and scene.relation is not None:
        parts += [RELATIONS[scene.relation], noun_phrase(scene.second, "dative")]
    if scene.place is not None:
        parts.append(PLACES[scene.place])
    return " ".join(parts) + "."
