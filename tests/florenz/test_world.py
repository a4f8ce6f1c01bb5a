"""The small world: every sentence reads back, agreement is right, pictures show what is told."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from fastvlm.florenz.world import (
    PREFIXES,
    Group,
    Scene,
    draw,
    draw_scene,
    language_of,
    number_of_scenes,
    read,
    related_scene,
    sentence,
)
from fastvlm.florenz.world.draw import PAINT
from fastvlm.florenz.world.grammar import FRAMES, LANGUAGES, all_groups

# ruff: noqa: RUF001, E501 (some of it is Cyrillic; a sentence stands on a line)

SCENE = Scene(
    Group(2, "small", "red", "star"), "left of", Group(1, None, "blue", "house"), "meadow"
)


@pytest.mark.parametrize(
    ("language", "frame", "words"),
    [
        ("en", "shows", "The image shows two small red stars to the left of a blue house on a meadow."),
        ("en", "exists", "There are two small red stars to the left of a blue house on a meadow."),
        ("de", "shows", "Das Bild zeigt zwei kleine rote Sterne links von einem blauen Haus auf einer Wiese."),
        ("de", "seen", "Man sieht zwei kleine rote Sterne links von einem blauen Haus auf einer Wiese."),
        ("fr", "shows", "La photo montre deux petites étoiles rouges à gauche d'une maison bleue dans un pré."),
        ("es", "seen", "Se ven dos estrellas rojas pequeñas a la izquierda de una casa azul en un prado."),
        ("ru", "shows", "На картинке изображены две маленькие красные звезды слева от синего дома на лугу."),
        ("ru", "exists", "На лугу есть две маленькие красные звезды слева от синего дома."),
        ("zh", "shows", "图为草地上的一座蓝色的房子左边的两颗红色的小星星。"),
    ],
)  # fmt: skip
def test_sentences_as_a_speaker_writes_them(language: str, frame: str, words: str) -> None:
    assert sentence(SCENE, language, frame) == words


@pytest.mark.parametrize(
    ("group", "language", "case", "words"),
    [
        (Group(1, None, "orange", "cup"), "en", "plain", "an orange cup"),
        (Group(3, None, "white", "fish"), "en", "plain", "three white fish"),
        (Group(1, "big", "green", "tree"), "de", "accusative", "einen großen grünen Baum"),
        (Group(1, "big", "white", "house"), "de", "accusative", "ein großes weißes Haus"),
        (Group(1, None, "red", "flower"), "de", "dative", "einer roten Blume"),
        (Group(1, None, "red", "heart"), "de", "dative", "einem roten Herzen"),
        (Group(4, "small", "black", "hat"), "de", "dative", "vier kleinen schwarzen Hüten"),
        (Group(1, "big", "white", "house"), "fr", "plain", "une grande maison blanche"),
        (Group(2, None, "orange", "boat"), "fr", "plain", "deux bateaux orange"),
        (Group(3, None, "blue", "fish"), "es", "plain", "tres peces azules"),
        (Group(1, "small", "yellow", "heart"), "es", "plain", "un corazón amarillo pequeño"),
        (Group(1, "big", "blue", "mushroom"), "ru", "nominative", "большой синий гриб"),
        (Group(1, "big", "blue", "tree"), "ru", "genitive", "большого синего дерева"),
        (Group(2, None, "blue", "ball"), "ru", "nominative", "два синих мяча"),
        (Group(2, None, "blue", "cup"), "ru", "nominative", "две синие чашки"),
        (Group(4, "small", "white", "tree"), "ru", "instrumental",
         "четырьмя маленькими белыми деревьями"),
        (Group(1, "small", "black", "car"), "zh", "plain", "一辆黑色的小汽车"),
        (Group(2, None, "green", "fish"), "zh", "plain", "两条绿色的鱼"),
    ],
)  # fmt: skip
def test_agreement(group: Group, language: str, case: str, words: str) -> None:
    assert LANGUAGES[language].noun_phrase(group, case) == words


def test_french_elides() -> None:
    scene = replace(SCENE, second=Group(1, "small", "green", "tree"))
    assert "à gauche d'un petit arbre vert" in sentence(scene, "fr")
    scene = replace(SCENE, relation="above", second=Group(2, None, "green", "tree"))
    assert "au-dessus de deux arbres verts" in sentence(scene, "fr")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_sentence_reads_back(language: str) -> None:
    chance = random.Random(language)
    for _ in range(60):
        scene = draw_scene(chance)
        for frame in FRAMES:
            found = read(sentence(scene, language, frame))
            assert (found.scene, found.language) == (scene, language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_phrase_means_one_group(language: str) -> None:
    for case in LANGUAGES[language].CASES:
        phrases = {LANGUAGES[language].noun_phrase(group, case) for group in all_groups()}
        assert len(phrases) == sum(1 for _ in all_groups())


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_caption_begins_with_the_prefix_of_its_language(language: str) -> None:
    assert sentence(SCENE, language).startswith(PREFIXES[language])
    assert language_of(PREFIXES[language]) == language


@pytest.mark.parametrize(
    "text",
    [
        "Das Bild zeigt ein roter Ball.",  # not the accusative
        "Das Bild zeigt einen rote Ball.",
        "На картинке изображена красный мяч.",
        "На картинке изображен красные мяч.",
        "La photo montre une ballon rouge.",
        "La photo montre un ballon rouge à gauche de un arbre vert.",
        "Se ven una pelota roja.",
        "The image shows a orange ball.",
        "图为一只红色的球。",  # another measure word
        "The image shows a red ball",
        "The image shows a red ball. A red ball.",
        "",
        "?!",
    ],
)
def test_what_is_wrong_does_not_read_as_a_scene(text: str) -> None:
    assert read(text).scene is None


def test_a_sentence_that_is_partly_right() -> None:
    found = read("Das Bild zeigt einen roten Ball und vielleicht eine Wolke.")
    assert found.language == "de"
    assert found.groups == (Group(1, None, "red", "ball"),)
    assert found.scene is None
    # the words are French, whatever was asked for
    assert read(sentence(SCENE, "fr"), "es").language == "fr"
    assert read(sentence(SCENE, "fr"), "es").scene is None
    assert read("lorem ipsum").language is None


def test_scenes_are_many_and_repeatable() -> None:
    assert number_of_scenes() > 500_000
    first, again = ([draw_scene(random.Random(s)) for s in range(50)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 45


def test_a_related_scene_shares_a_group() -> None:
    chance = random.Random(3)
    for _ in range(100):
        scene = draw_scene(chance)
        assert set(related_scene(scene, chance).groups) & set(scene.groups)


def _share(picture: object, colour: str) -> np.ndarray:
    pixels = np.asarray(picture).astype(int)
    return (np.abs(pixels - np.array(PAINT[colour])).sum(-1) < 40).astype(float)


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_a_picture_shows_where_things_lie(relation: str) -> None:
    scene = Scene(Group(1, "big", "red", "ball"), relation, Group(3, None, "blue", "cup"))
    picture = draw(scene, 96)
    (red_y, red_x), (blue_y, blue_x) = (
        [axis.mean() for axis in np.nonzero(_share(picture, colour))] for colour in ("red", "blue")
    )
    found = {
        "left of": red_x < blue_x - 20,
        "right of": red_x > blue_x + 20,
        "above": red_y < blue_y - 20,
        "below": red_y > blue_y + 20,
    }
    assert [name for name, true in found.items() if true] == [relation]


def test_a_picture_shows_sizes_counts_and_places() -> None:
    def red(count: int, size: str | None, place: str | None = None) -> float:
        scene = Scene(Group(count, size, "red", "ball"), place=place)
        return float(_share(draw(scene, 128), "red").sum())

    assert red(1, "small") < red(1, None) < red(1, "big")
    for count in (2, 3, 4):
        assert red(count, None) == pytest.approx(count * red(1, None), rel=0.05)
    corners = {tuple(np.asarray(draw(Scene(SCENE.first, place=p), 64))[-1, 0]) for p in
               (None, "meadow", "beach", "snow", "street", "night")}  # fmt: skip
    assert len(corners) == 6


def test_pictures_are_repeatable_and_stay_inside() -> None:
    chance = random.Random(1)
    for number in range(30):
        scene = replace(draw_scene(chance), place=None)
        picture = np.asarray(draw(scene, 64, seed=number))
        assert (picture == np.asarray(draw(scene, 64, seed=number))).all()
        edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (np.abs(edge.astype(int) - edge[0]).max() < 8).all(), scene


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Group(5, None, "red", "ball"), "count must be a whole number from 1 to 4; got 5"),
        (lambda: Group(1, None, "pink", "ball"), "colour must be .*pink"),
        (lambda: Group(1, None, "red", "dog"), "kind must be .*dog"),
        (lambda: Scene(SCENE.first, "above"), "relation must be given with second"),
        (lambda: replace(SCENE, place="moon"), "place must be .*moon"),
        (lambda: sentence(SCENE, "it"), "language must be .*it"),
        (lambda: sentence(SCENE, "en", "sings"), "frame must be .*sings"),
        (lambda: draw(SCENE, 4), "size must be a whole number, 16 or more; got 4"),
    ],
)
def test_what_the_world_does_not_have_is_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]
