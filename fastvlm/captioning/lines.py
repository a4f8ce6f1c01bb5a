"""The lines of an output: what was answered about a picture, or why nothing was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastvlm.captioning.answers import Answer
from fastvlm.captioning.tasks import Question
from fastvlm.decoding.pictures import PictureError

Line = dict[str, Any]


def answered(path: str, answers: Sequence[Answer], by: Mapping[str, Any]) -> list[Line]:
    """by: the model and its revision."""
    return [{"path": path, **answer.fields(), **by} for answer in answers]


def failed(
    path: str, asked: Sequence[Question], error: BaseException, by: Mapping[str, Any]
) -> list[Line]:
    """A line for each question, with the reason."""
    reason = reason_of(error)
    return [
        {"path": path, "task": one.name, "language": one.language, "error": reason, **by}
        for one in asked
    ]


def reason_of(error: BaseException) -> str:
    """What a line says of an error."""
    if isinstance(error, PictureError):
        return error.reason
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
