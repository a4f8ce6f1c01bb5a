"""French sentences of the small world: size before the noun, colour behind it, elision."""

from __future__ import annotations

from fastvlm.florenz.world.scene import Group, Scene

CASES = ("plain",)
NOUNS = {
    "ball": ("m", "ballon", "ballons"), "star": ("f", "étoile", "étoiles"),
    "house": ("f", "maison", "maisons"), "tree": ("m", "arbre", "arbres"),
    "boat": ("m", "bateau", "bateaux"), "fish": ("m", "poisson", "poissons"),
    "cup": ("f", "tasse", "tasses"), "flower": ("f", "fleur", "fleurs"),
    "car": ("f", "voiture", "voitures"), "heart": ("m", "cœur", "cœurs"),
    "hat": ("m", "chapeau", "chapeaux"), "mushroom": ("m", "champignon", "champignons"),
}  # fmt: skip
# masculine and feminine; the plural adds s, but for orange, which never changes
ADJECTIVES = {
    "red": ("rouge", "rouge"), "blue": ("bleu", "bleue"), "green": ("vert", "verte"),
    "yellow": ("jaune", "jaune"), "black": ("noir", "noire"), "white": ("blanc", "blanche"),
    "purple": ("violet", "violette"), "small": ("petit", "petite"), "big": ("grand", "grande"),
}  # fmt: skip
NUMBERS = ("deux", "trois", "quatre")
RELATIONS = {
    "left of": "à gauche de", "right of": "à droite de", "above": "au-dessus de",
    "below": "au-dessous de",
}  # fmt: skip
PLACES = {
    "meadow": "dans un pré", "beach": "sur une plage", "snow": "dans la neige",
    "street": "dans une rue", "night": "sous le ciel nocturne",
}  # fmt: skip
FRAMES = {"shows": "La photo montre", "exists": "Il y a", "seen": "On voit"}


def _adjective(word: str, gender: str, count: int) -> str:
    if word == "orange":
        return word
    return ADJECTIVES[word][gender == "f"] + ("s" if count > 1 else "")


def noun_phrase(group: Group, case: str) -> str:
    gender, *forms = NOUNS[group.kind]
    article = "une" if gender == "f" else "un"
    words = [article if group.count == 1 else NUMBERS[group.count - 2]]
    if group.size is not None:
        words.append(_adjective(group.size, gender, group.count))
    words += [forms[group.count > 1], _adjective(group.colour, gender, group.count)]
    return " ".join(words)


def _of(relation: str, phrase: str) -> str:
    """de and un, une become d'un, d'une."""
    if phrase.startswith("un"):
        return f"{relation.removesuffix(' de')} d'{phrase}"
    return f"{relation} {phrase}"


def sentence(scene: Scene, frame: str) -> str:
    parts = [FRAMES[frame], noun_phrase(scene.first, "plain")]
    if scene.second is not None and scene.relation is not None:
        parts.append(_of(RELATIONS[scene.relation], noun_phrase(scene.second, "plain")))
    if scene.place is not None:
        parts.append(PLACES[scene.place])
    return " ".join(parts) + "."
