"""What a model's words mean: text, boxes, lines of writing, outlines, in pixels of the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastvlm.captioning.tasks import Question
from fastvlm.decoding.writer import Writer

_SPECIAL = re.compile(r"</?s>|<pad>")


@dataclass(frozen=True)
class Answer:
    """One answer about one picture.

    task: its token with its input ("<OD>"), or the prompt's text. language: its code, None where
        nobody chose one. score: as `fastvlm.Caption.score`. tokens: the generated ids.
    text: of a caption without special tokens; of a task that finds things the model's own words,
        with its <loc_…>.
    boxes: [x1, y1, x2, y2] each; quads: [x1, y1, …, x4, y4] each, around lines of writing;
        polygons: of each thing the outlines [x1, y1, x2, y2, …] of its parts; all in pixels of the
        picture as it is looked at (EXIF applied), whole numbers. None where the task has none.
    labels: of the boxes or quads, then of the polygons; "" for what has no name.
    """

    task: str
    language: str | None
    text: str
    score: float
    tokens: tuple[int, ...]
    boxes: list[list[int]] | None = None
    quads: list[list[int]] | None = None
    polygons: list[list[list[int]]] | None = None
    labels: list[str] | None = None

    def fields(self) -> dict[str, Any]:
        """As a line of the output has it."""
        found: dict[str, Any] = {
            "task": self.task, "language": self.language, "text": self.text,
            "score": round(self.score, 5),
        }  # fmt: skip
        for name in ("boxes", "quads", "polygons", "labels"):
            value = getattr(self, name)
            if value is not None:
                found[name] = value
        return found


class Reader:
    """Turns tokens into answers, with the processor's own post_process_generation."""

    def __init__(self, writer: Writer, processor: Any, keep_prefix: bool) -> None:
        self.writer = writer
        self.keep_prefix = keep_prefix
        self.post_process = getattr(processor, "post_process_generation", None)

    def check(self, questions: Sequence[Question]) -> None:
        """ValueError: a task that finds things, and a processor that cannot say where."""
        for question in questions:
            if question.answer != "text" and self.post_process is None:
                raise ValueError(
                    f"fastvlm.Captioner: processor must be one with post_process_generation for "
                    f"{question.name}"
                )

    def read(
        self,
        question: Question,
        tokens: tuple[int, ...],
        score: float,
        size: tuple[int, int] | None,
    ) -> Answer:
        """size: width and height of the picture; None where only pixel_values were given."""
        if question.answer == "text":
            text = self.writer.text(tokens, question.prefix if self.keep_prefix else "")
            return Answer(question.name, question.language, text, score, tokens)
        if size is None:
            raise ValueError(
                f"fastvlm.Captioner: picture must be a picture, not pixel_values, for "
                f"{question.name}, whose answer is in pixels"
            )
        words = self.writer.target_words.decode(list(tokens), skip_special_tokens=False)
        assert question.task is not None
        token = question.task.token
        parsed = self.post_process(text=words, task=token, image_size=size)[token]  # type: ignore[misc]
        found = {
            "boxes": parsed.get("bboxes"),
            "quads": parsed.get("quad_boxes"),
            "polygons": parsed.get("polygons"),
        }
        labels = parsed.get("labels")
        if labels is None:
            labels = [*parsed.get("bboxes_labels", ()), *parsed.get("polygons_labels", ())]
        return Answer(
            question.name,
            question.language,
            _SPECIAL.sub("", words).strip(),
            score,
            tokens,
            labels=[str(label) for label in labels],
            **found,
        )
