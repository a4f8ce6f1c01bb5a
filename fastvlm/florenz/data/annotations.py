"""Texts about an image, with their task, language and prompt: what a training step is made of.

Source: arXiv 2503.09443, section 2, and the facts of its released preparation of CC12M: captions by
length, descriptions as translations, sentences found for an image alone and as paragraphs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastvlm.checks import choice, fail
from fastvlm.decoding.languages import LANGUAGES, TASKS

CAPTION, TRANSLATION = "caption", "translation"
TRANSLATE = "<TRANSLATE>"
# English texts that are shorter are left out
LEAST_CHARACTERS = 26
# the (task, language) pairs of pre-training: captions in two languages, translations into five
GROUPS = (
    *((CAPTION, code) for code in ("de", "en")),
    *((TRANSLATION, code) for code in ("de", "es", "fr", "ru", "zh")),
)
_OP = "florenz.data"
_MARKED = re.compile(r"<LANG_([A-Z]{2})>(<[A-Z_]+>)(.*)", re.DOTALL)
# a sentence ends at its mark: with a space behind it, but for Chinese ones
_ENDS = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")  # noqa: RUF001


@dataclass(frozen=True)
class Annotation:
    """task: "caption" or "translation". language: of text, a code. prompt: as published,
    ``<LANG_DE><CAPTION>`` or ``<LANG_DE><TRANSLATE>the English text``."""

    task: str
    language: str
    prompt: str
    text: str

    def record(self) -> dict[str, str]:
        return asdict(self)


def marked_prompt(language: str, task: str, text: str = "") -> str:
    """A prompt in the published form. task: one of Florence-2's task tokens, or <TRANSLATE>.

    ValueError: a language or task that there is not.
    """
    choice(_OP, "language", language, tuple(LANGUAGES))
    choice(_OP, "task", task, (*TASKS, TRANSLATE))
    return f"<LANG_{language.upper()}>{task}{text}"


def spelled_prompt(prompt: str, *, bare: bool = False) -> str:
    """What the encoder reads for a prompt in the published form; other text as it is.

    ``<LANG_DE><CAPTION>`` is "The target language is German. What does the image describe?".
    bare: of a caption no language is named; a translation has to name its own.
    ValueError: a language or task that there is not.
    """
    found = _MARKED.fullmatch(prompt)
    if found is None:
        return prompt
    code, task, text = found.groups()
    choice(_OP, "the language of a prompt", code.lower(), tuple(LANGUAGES))
    choice(_OP, "the task of a prompt", task, (*TASKS, TRANSLATE))
    if bare and task != TRANSLATE:
        return TASKS[task]
    words = f"Translate the following text: {text}" if task == TRANSLATE else TASKS[task]
    return f"The target language is {LANGUAGES[code.lower()].name}. {words}"


def sentences(text: str) -> list[str]:
    """The sentences of a text. A mark inside of a word or number ends none."""
    return [part for part in _ENDS.split(text.strip()) if part]


def _joined(parts: Sequence[str], language: str) -> str:
    return ("" if language == "zh" else " ").join(parts)


def annotations_of(
    description: Mapping[str, str],
    pairs: Mapping[str, Sequence[tuple[str, str]]],
    draw: random.Random,
) -> list[Annotation]:
    """All annotations of one image, as published.

    description: the image in words, by language; "en" and, where it was translated, others.
    pairs: by language, (English, translated) sentences that a search found for the image.
    draw: chooses the random subsets and paragraphs.

    Of a description in English and German: its first sentence is a caption, two sentences a
    detailed one, three and more a more detailed one, and a shuffled subset of two or more another.
    A translated description is a translation too, and so is every pair, and a paragraph of two or
    more shuffled pairs. English texts of 25 characters and fewer are left out. Captions are taken
    in the languages that captions are seen in, German and English.
    ValueError: a language that there is not, no English beside another language.
    """
    for name, given in (("description", description), ("pairs", pairs)):
        for code in given:
            choice(_OP, f"a language of {name}", code, tuple(LANGUAGES))
    english = description.get("en")
    if description and english is None:
        raise fail(_OP, "description", "given in 'en' too", sorted(description))
    found: list[Annotation] = []
    if english is not None and len(english) >= LEAST_CHARACTERS:
        for code in sorted(set(description) & {"en", "de"}):
            found.extend(_captions(description[code], code, draw))
        for code in sorted(set(description) - {"en"}):
            found.append(_translation(english, description[code], code))
    for code in sorted(pairs):
        long = [pair for pair in pairs[code] if len(pair[0]) >= LEAST_CHARACTERS]
        found.extend(_translation(source, text, code) for source, text in long)
        if len(long) >= 2:
            some = draw.sample(long, draw.randint(2, len(long)))
            sources, texts = zip(*some)
            paragraph = _joined(texts, code)
            found.append(_translation(_joined(sources, "en"), paragraph, code))
    return found


def _captions(text: str, code: str, draw: random.Random) -> list[Annotation]:
    parts = sentences(text)
    if not parts:
        return []
    detailed = {2: "<DETAILED_CAPTION>"}.get(len(parts), "<MORE_DETAILED_CAPTION>")
    wanted = [("<CAPTION>", parts[0])]
    if len(parts) >= 2:
        wanted.append((detailed, text))
        some = draw.sample(parts, draw.randint(2, len(parts)))
        kind = "<DETAILED_CAPTION>" if len(some) == 2 else "<MORE_DETAILED_CAPTION>"
        wanted.append((kind, _joined(some, code)))
    return [Annotation(CAPTION, code, marked_prompt(code, task), text) for task, text in wanted]


def _translation(source: str, text: str, code: str) -> Annotation:
    return Annotation(TRANSLATION, code, marked_prompt(code, TRANSLATE, source), text)


def parsed(record: Any) -> Annotation:
    """An annotation of a shard. ValueError: a field that is missing or no text, another language
    or task than there are."""
    fields = ("task", "language", "prompt", "text")
    if not isinstance(record, Mapping) or any(
        not isinstance(record.get(name), str) or not record[name].strip() for name in fields
    ):
        raise fail(_OP, "an annotation", f"a mapping with the texts {', '.join(fields)}", record)
    choice(_OP, "the language of an annotation", record["language"], tuple(LANGUAGES))
    choice(_OP, "the task of an annotation", record["task"], (CAPTION, TRANSLATION))
    spelled_prompt(record["prompt"])
    return Annotation(*(record[name] for name in fields))
