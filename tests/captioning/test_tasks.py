"""Florence-2's tasks: the table is transformers', what cannot be asked is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from speakers import florence2_processor

from fastvlm.captioning import models
from fastvlm.captioning.answers import Reader
from fastvlm.captioning.tasks import TASKS, questions, split
from fastvlm.decoding.languages import TASKS as CAPTIONS


def test_the_table_is_that_of_florence2s_processor() -> None:
    real = florence2_processor()
    prompts = {**real.task_prompts_without_inputs, **real.task_prompts_with_input}
    assert {token: task.prompt for token, task in TASKS.items()} == prompts
    kinds = {
        "pure_text": "text", "ocr": "quads", "description_with_bboxes": "boxes", "bboxes": "boxes",
        "phrase_grounding": "boxes", "polygons": "polygons",
        "description_with_bboxes_or_polygons": "either",
    }  # fmt: skip
    for token, task in TASKS.items():
        assert task.answer == kinds[real.tasks_answer_post_processing_type[token]]


def test_prompts_are_those_that_the_processor_makes() -> None:
    real = florence2_processor()
    for name in (
        "<OD>",
        "<CAPTION_TO_PHRASE_GROUNDING> A {green} car ",
        "<REGION_TO_OCR><loc_1><loc_20><loc_300><loc_999>",
        "Describe the image",
    ):
        asked = [name] if "{" not in name else [name.replace("{green}", "green")]
        assert [q.prompt for q in questions(asked, None)] == real._construct_prompts(asked[0])
    # braces of the user's own are words like any other
    braces = questions(["<OPEN_VOCABULARY_DETECTION>{a}"], None)
    assert braces[0].prompt == "Locate {a} in the image."


@pytest.mark.parametrize("given", ["<OD>", "od", "OD", " <od> "])
def test_a_task_may_be_written_plainly(given: str) -> None:
    assert split(given) == (TASKS["<OD>"], "")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("<CAPTIONS>", "a task of <CAPTION>, "),
        ("", "got nothing"),
        ("<OD>a cat", "<OD> alone"),
        ("<OPEN_VOCABULARY_DETECTION>", "behind it, the words that it is about"),
        ("<REGION_TO_OCR>the sign", "<REGION_TO_OCR><loc_x1>"),
        ("<REGION_TO_OCR><loc_1><loc_2><loc_3>", "<loc_x1>"),
    ],
)
def test_what_cannot_be_asked_is_refused(given: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=re.escape(wanted)):
        split(given)


def test_languages_are_those_of_descriptions() -> None:
    asked = questions(["<CAPTION>", "<OD>", "in {language}"], ["de", "fr"])
    assert [(q.name, q.language) for q in asked] == [
        ("<CAPTION>", "de"), ("<CAPTION>", "fr"), ("<OD>", None), ("in {language}", "de"),
        ("in {language}", "fr"),
    ]  # fmt: skip
    assert [q.prefix for q in asked][:3] == ["Das Bild zeigt", "La photo montre", ""]
    assert asked[-1].prompt == "in French"
    plain = questions(["<CAPTION>", "<CAPTION>"], None)
    assert [(q.language, q.prefix, q.prompt) for q in plain] == [(None, "", CAPTIONS["<CAPTION>"])]


class Says:
    """A writer's vocabulary that says what it was told to."""

    def __init__(self, words: str) -> None:
        self.words = words
        self.target_words = self

    def decode(self, tokens: Any, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return self.words


@pytest.mark.parametrize(
    ("task", "words", "found"),
    [
        (
            "<OD>",
            "</s><s>car<loc_0><loc_500><loc_999><loc_250>dog<loc_1><loc_1><loc_2><loc_2></s><pad>",
            {"boxes": [[0, 200, 999, 100], [1, 0, 2, 1]], "labels": ["car", "dog"]},
        ),
        (
            "<OCR_WITH_REGION>",
            "STOP<loc_1><loc_1><loc_9><loc_1><loc_9><loc_9><loc_1><loc_9>",
            {"quads": [[1, 0, 9, 0, 9, 3, 1, 3]], "labels": ["STOP"]},
        ),
        (
            "<REFERRING_EXPRESSION_SEGMENTATION>a car",
            "<loc_1><loc_1><loc_9><loc_1><loc_9><loc_9>",
            {"polygons": [[[1, 0, 9, 0, 9, 3]]], "labels": [""]},
        ),
        (
            "<OPEN_VOCABULARY_DETECTION>cat",
            "cat<loc_1><loc_1><loc_9><loc_9>",
            {"boxes": [[1, 0, 9, 3]], "polygons": [], "labels": ["cat"]},
        ),
        ("<REGION_PROPOSAL>", "nothing", {"boxes": [], "labels": []}),
    ],
)
def test_answers_are_in_pixels_of_the_picture(task: str, words: str, found: Any) -> None:
    """By the processor's own post_process_generation."""
    reader = Reader(Says(words), models.random(True, "cpu").processor, False)  # type: ignore[arg-type]
    (question,) = questions([task], None)
    fields = reader.read(question, (1, 2), -0.5, (1000, 400)).fields()
    shown = re.sub("</?s>|<pad>", "", words)
    assert fields == {"task": task, "language": None, "text": shown, "score": -0.5, **found}
    with pytest.raises(ValueError, match="picture must be a picture, not pixel_values"):
        reader.read(question, (1, 2), -0.5, None)


def test_random_weights_see_the_pixels_of_the_demo() -> None:
    from folders import noise

    from fastvlm.loading.random_florence2 import to_pixels

    processor = models.random(True, "cpu").processor
    got = processor.image_processor(images=[noise(3)], return_tensors="pt")["pixel_values"]
    assert torch.allclose(got, to_pixels(noise(3), 96), atol=1e-5)
