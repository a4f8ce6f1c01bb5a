"""A .txt beside each picture, as trainers of image models read them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fastvlm.captioning.answers import Answer
from fastvlm.captioning.sources import Item
from fastvlm.captioning.tasks import Question


class Texts:
    """Writes photo.txt beside photo.jpg; of several questions photo.<task>.<language>.txt.

    A file that is there already stays: it may be somebody's own. say hears of it.
    """

    def __init__(self, questions: Sequence[Question], say: Callable[[str], None]) -> None:
        self.say = say
        several_tasks = len({question.name for question in questions}) > 1
        several_languages = len({question.language for question in questions}) > 1
        self._ends = {}
        for question in questions:
            parts = [_slug(question.name)] if several_tasks else []
            if several_languages and question.language is not None:
                parts.append(question.language)
            self._ends[question.name, question.language] = "".join(f".{part}" for part in parts)
        if len(set(self._ends.values())) < len(self._ends):
            # two texts that read alike: their numbers tell them apart
            self._ends = {key: f"{end}.{n}" for n, (key, end) in enumerate(self._ends.items())}

    def __call__(self, item: Item, asked: Sequence[Question], answers: Sequence[Answer]) -> None:
        stem = Path(item.file).with_suffix("")
        for answer in answers:
            path = stem.with_name(f"{stem.name}{self._ends[answer.task, answer.language]}.txt")
            new = path.with_name(f".{path.name}.new")
            text = answer.text + "\n"
            if path.exists():
                if path.read_bytes() != text.encode():
                    self.say(f"{path}: there already, and left as it is")
                continue
            try:
                new.write_text(text, encoding="utf-8", newline="\n")
                os.replace(new, path)
            finally:
                new.unlink(missing_ok=True)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:40] or "text"
