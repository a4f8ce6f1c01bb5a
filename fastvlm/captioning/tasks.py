"""The tasks of Florence-2: how they are asked, and what their answers hold.

Source: transformers' Florence2Processor (a test compares the table with it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastvlm.decoding.languages import TASKS as CAPTIONS
from fastvlm.decoding.languages import Language, chosen, prompt_texts

_REGION = re.compile(r"(<loc_\d{1,3}>){4,}")
_TOKEN = re.compile(r"<[A-Za-z0-9_]+>")


@dataclass(frozen=True)
class Task:
    """token: as Florence-2 writes it. prompt: what the model reads for it, {input} filled in.

    answer: "text"; or what is found in the picture: "boxes", "quads", "polygons", "either".
    most_tokens: what its answers take at most, unless somebody says otherwise.
    """

    token: str
    prompt: str
    answer: str = "text"
    most_tokens: int = 256

    @property
    def takes_input(self) -> bool:
        return "{input}" in self.prompt

    @property
    def takes_region(self) -> bool:
        return self.token.startswith("<REGION_TO_")


_CAPTION_TOKENS = {"<CAPTION>": 64, "<DETAILED_CAPTION>": 128, "<MORE_DETAILED_CAPTION>": 256}
_LONG = 960

TASKS: Mapping[str, Task] = {
    task.token: task
    for task in (
        *(Task(token, text, "text", _CAPTION_TOKENS[token]) for token, text in CAPTIONS.items()),
        Task("<OD>", "Locate the objects with category name in the image.", "boxes", _LONG),
        Task(
            "<DENSE_REGION_CAPTION>",
            "Locate the objects in the image, with their descriptions.",
            "boxes",
            _LONG,
        ),
        Task("<REGION_PROPOSAL>", "Locate the region proposals in the image.", "boxes", _LONG),
        Task("<OCR>", "What is the text in the image?", "text", _LONG),
        Task("<OCR_WITH_REGION>", "What is the text in the image, with regions?", "quads", _LONG),
        Task(
            "<CAPTION_TO_PHRASE_GROUNDING>",
            "Locate the phrases in the caption: {input}",
            "boxes",
            _LONG,
        ),
        Task("<OPEN_VOCABULARY_DETECTION>", "Locate {input} in the image.", "either", _LONG),
        Task(
            "<REFERRING_EXPRESSION_SEGMENTATION>",
            "Locate {input} in the image with mask",
            "polygons",
            _LONG,
        ),
        Task(
            "<REGION_TO_SEGMENTATION>",
            "What is the polygon mask of region {input}",
            "polygons",
            _LONG,
        ),
        Task("<REGION_TO_CATEGORY>", "What is the region {input}?", "text", 64),
        Task("<REGION_TO_DESCRIPTION>", "What does the region {input} describe?", "text", 128),
        Task("<REGION_TO_OCR>", "What text is in the region {input}?", "text", 256),
    )
}


@dataclass(frozen=True)
class Question:
    """A task as it stands in an answer (its token and its input, or free text), and its parts.

    language: the code of the answer's language; None: as the model likes. prompt, prefix: what the
    model reads, and what its answer begins with. task: None for free text.
    """

    name: str
    language: str | None
    prompt: str
    prefix: str
    task: Task | None

    @property
    def answer(self) -> str:
        return "text" if self.task is None else self.task.answer

    @property
    def most_tokens(self) -> int:
        return 128 if self.task is None else self.task.most_tokens


def split(name: str) -> tuple[Task | None, str]:
    """A task and its input: "<OD>", "OD", "<OPEN_VOCABULARY_DETECTION>a cat", or None and the text.

    ValueError: a token that is none of Florence-2's, an input too many or missing.
    """
    name = name.strip()
    if not name:
        raise ValueError(f"a task of {', '.join(TASKS)}, or text; got nothing")
    bare = f"<{name.upper()}>"
    if bare in TASKS:
        name = bare
    token = _TOKEN.match(name)
    if token is None:
        return None, name
    task = TASKS.get(token.group().upper())
    if task is None:
        raise ValueError(f"a task of {', '.join(TASKS)}, or text; got {name!r}")
    rest = name[token.end() :].strip()
    if rest and not task.takes_input:
        raise ValueError(f"{task.token} alone; got {name!r}")
    if task.takes_region and not _REGION.fullmatch(rest):
        wanted = f"{task.token}<loc_x1><loc_y1><loc_x2><loc_y2>, each 0 to 999 of width or height"
        raise ValueError(f"{wanted}; got {name!r}")
    if task.takes_input and not rest:
        raise ValueError(f"{task.token} and, behind it, the words that it is about; got {name!r}")
    return task, rest


def questions(
    tasks: Sequence[str],
    languages: Sequence[str] | None,
    prefixes: Mapping[str, str] | None = None,
    names_target: bool = False,
) -> list[Question]:
    """Each task in each language; a task whose answer is no description has none.

    languages: codes, as for `fastvlm.caption`; None: answers as the model likes, without a prefix.
    names_target: as for `prompt_texts`. ValueError: a task, or a language, that cannot be.
    """
    spoken: list[Language] = [] if languages is None else chosen(languages, prefixes)
    found: dict[tuple[str, str | None], Question] = {}
    for given in tasks:
        task, rest = split(given)
        name = rest if task is None else task.token + rest
        describes = task is None or task.token in CAPTIONS
        text = rest if task is None else task.prompt.replace("{input}", rest)
        if describes and spoken:
            asked = text if task is None else task.token
            for language, prompt in zip(spoken, prompt_texts(spoken, asked, names_target)):
                found[name, language.code] = Question(
                    name, language.code, prompt, language.prefix, task
                )
        else:
            found[name, None] = Question(name, None, text, "", task)
    return list(found.values())
