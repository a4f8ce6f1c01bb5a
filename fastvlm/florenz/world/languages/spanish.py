"""Spanish sentences of the small world: colour and size behind the noun, a verb that agrees."""

from __future__ import annotations

from fastvlm.florenz.world.scene import Group, Scene

CASES = ("plain",)
NOUNS = {
    "ball": ("f", "pelota", "pelotas"), "star": ("f", "estrella", "estrellas"),
    "house": ("f", "casa", "casas"), "tree": ("m", "árbol", "árboles"),
    "boat": ("m", "barco", "barcos"), "fish": ("m", "pez", "peces"),
    "cup": ("f", "taza", "tazas"), "flower": ("f", "flor", "flores"),
    "car": ("m", "coche", "coches"), "heart": ("m", "corazón", "corazones"),
    "hat": ("m", "sombrero", "sombreros"), "mushroom": ("f", "seta", "setas"),
}  # fmt: skip
# masculine and feminine, singular and plural; naranja never changes
ADJECTIVES = {
    "red": ("rojo", "roja", "rojos", "rojas"), "blue": ("azul", "azul", "azules", "azules"),
    "green": ("verde", "verde", "verdes", "verdes"),
    "yellow": ("amarillo", "amarilla", "amarillos", "amarillas"),
    "black": ("negro", "negra", "negros", "negras"),
    "white": ("blanco", "blanca", "blancos", "blancas"),
    "orange": ("naranja", "naranja", "naranja", "naranja"),
    "purple": ("morado", "morada", "morados", "moradas"),
    "small": ("pequeño", "pequeña", "pequeños", "pequeñas"),
    "big": ("grande", "grande", "grandes", "grandes"),
}  # fmt: skip
NUMBERS = ("dos", "tres", "cuatro")
RELATIONS = {
    "left of": "a la izquierda de", "right of": "a la derecha de", "above": "encima de",
    "below": "debajo de",
}  # fmt: skip
PLACES = {
    "meadow": "en un prado", "beach": "en una playa", "snow": "en la nieve",
    "street": "en una calle", "night": "bajo el cielo nocturno",
}  # fmt: skip


def noun_phrase(group: Group, case: str) -> str:
    gender, *forms = NOUNS[group.kind]
    many = group.count > 1
    article = "una" if gender == "f" else "un"
    number = NUMBERS[group.count - 2] if many else article
    form = 2 * many + (gender == "f")
    adjectives = [ADJECTIVES[word][form] for word in (group.colour, group.size) if word]
    return " ".join([number, forms[many], *adjectives])


def sentence(scene: Scene, frame: str) -> str:
    words = {
        "shows": "La imagen muestra",
        "exists": "Hay",
        "seen": "Se ve" if scene.first.count == 1 else "Se ven",
    }[frame]
    parts = [words, noun_phrase(scene.first, "plain")]
    if scene.second is not None and scene.relation is not None:
        parts += [RELATIONS[scene.relation], noun_phrase(scene.second, "plain")]
    if scene.place is not None:
        parts.append(PLACES[scene.place])
    return " ".join(parts) + "."
