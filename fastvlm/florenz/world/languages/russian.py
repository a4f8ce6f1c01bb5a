"""Russian sentences of the small world: no article, six forms of a noun, numbers that govern."""

# ruff: noqa: RUF001 (it is Cyrillic)

from __future__ import annotations

from fastvlm.florenz.world.scene import Group, Scene

CASES = ("nominative", "genitive", "instrumental")
# gender; singular nominative, genitive, instrumental; plural genitive, instrumental
NOUNS = {
    "ball": ("m", "мяч", "мяча", "мячом", "мячей", "мячами"),
    "star": ("f", "звезда", "звезды", "звездой", "звезд", "звездами"),
    "house": ("m", "дом", "дома", "домом", "домов", "домами"),
    "tree": ("n", "дерево", "дерева", "деревом", "деревьев", "деревьями"),
    "boat": ("f", "лодка", "лодки", "лодкой", "лодок", "лодками"),
    "fish": ("f", "рыба", "рыбы", "рыбой", "рыб", "рыбами"),
    "cup": ("f", "чашка", "чашки", "чашкой", "чашек", "чашками"),
    "flower": ("m", "цветок", "цветка", "цветком", "цветков", "цветками"),
    "car": ("f", "машина", "машины", "машиной", "машин", "машинами"),
    "heart": ("n", "сердце", "сердца", "сердцем", "сердец", "сердцами"),
    "hat": ("f", "шляпа", "шляпы", "шляпой", "шляп", "шляпами"),
    "mushroom": ("m", "гриб", "гриба", "грибом", "грибов", "грибами"),
}
STEMS = {
    "red": "красн", "blue": "син", "green": "зелен", "yellow": "желт", "black": "черн",
    "white": "бел", "orange": "оранжев", "purple": "фиолетов", "small": "маленьк",
    "big": "больш",
}  # fmt: skip
# endings of a hard stem: singular by gender, then the plural
HARD = {
    "nominative": {"m": "ый", "f": "ая", "n": "ое", "many": "ые"},
    "genitive": {"m": "ого", "f": "ой", "n": "ого", "many": "ых"},
    "instrumental": {"m": "ым", "f": "ой", "n": "ым", "many": "ыми"},
}
SOFT = {"ый": "ий", "ая": "яя", "ое": "ее", "ые": "ие", "ого": "его", "ой": "ей", "ых": "их"}
SOFT |= {"ым": "им", "ыми": "ими"}
# no ы after к and ш
MIXED = {"ый": "ий", "ые": "ие", "ых": "их", "ым": "им", "ыми": "ими"}
NUMBERS = {
    "nominative": ("два", "три", "четыре"),
    "genitive": ("двух", "трех", "четырех"),
    "instrumental": ("двумя", "тремя", "четырьмя"),
}
RELATIONS = {
    "left of": ("слева от", "genitive"), "right of": ("справа от", "genitive"),
    "above": ("над", "instrumental"), "below": ("под", "instrumental"),
}  # fmt: skip
PLACES = {
    "meadow": "на лугу", "beach": "на пляже", "snow": "на снегу", "street": "на улице",
    "night": "под ночным небом",
}  # fmt: skip
SHOWN = {"m": "изображен", "f": "изображена", "n": "изображено", "many": "изображены"}
SEEN = {"m": "Виден", "f": "Видна", "n": "Видно", "many": "Видны"}


def _adjective(word: str, case: str, form: str) -> str:
    ending = HARD[case][form]
    if word == "blue":
        ending = SOFT[ending]
    elif word == "big" and (case, form) == ("nominative", "m"):
        ending = "ой"
    elif word in ("small", "big"):
        ending = MIXED.get(ending, ending)
    return STEMS[word] + ending


def noun_phrase(group: Group, case: str) -> str:
    gender, nominative, genitive, instrumental, genitives, instrumentals = NOUNS[group.kind]
    words = [word for word in (group.size, group.colour) if word]
    if group.count == 1:
        noun = {"nominative": nominative, "genitive": genitive}.get(case, instrumental)
        return " ".join([*(_adjective(word, case, gender) for word in words), noun])
    number = NUMBERS[case][group.count - 2]
    if case != "nominative":
        noun = genitives if case == "genitive" else instrumentals
        return " ".join([number, *(_adjective(word, case, "many") for word in words), noun])
    # two to four govern the genitive: of the noun the singular, of its adjectives the plural,
    # which stays in the nominative with feminine nouns
    number = "две" if group.count == 2 and gender == "f" else number
    kind = "nominative" if gender == "f" else "genitive"
    return " ".join([number, *(_adjective(word, kind, "many") for word in words), genitive])


def _agreement(group: Group) -> str:
    return "many" if group.count > 1 else NOUNS[group.kind][0]


def sentence(scene: Scene, frame: str) -> str:
    first, place = noun_phrase(scene.first, "nominative"), PLACES.get(scene.place or "")
    related = []
    if scene.second is not None and scene.relation is not None:
        words, case = RELATIONS[scene.relation]
        related = [words, noun_phrase(scene.second, case)]
    if frame == "exists":
        where = place or "здесь"
        parts = [where[0].upper() + where[1:], "есть", first, *related]
    else:
        begin = SHOWN if frame == "shows" else SEEN
        verb = begin[_agreement(scene.first)]
        parts = [f"На картинке {verb}" if frame == "shows" else verb, first, *related]
        parts += [place] if place else []
    return " ".join(parts) + "."
