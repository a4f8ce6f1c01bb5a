"""The languages of the reference workload: what a prompt calls them, and how a caption begins.

Source: arXiv 2503.09443 (prefixes that make captions emerge in languages that were only translated
into, and prompts that name the target language) and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastvlm.checks import describe, fail

OP = "caption"


@dataclass(frozen=True)
class Language:
    """code: as callers write it. name: in a prompt. prefix: the first words of a caption."""

    code: str
    name: str
    prefix: str


LANGUAGES: Mapping[str, Language] = {
    language.code: language
    for language in (
        Language("en", "English", "The image shows"),
        Language("de", "German", "Das Bild zeigt"),
        Language("fr", "French", "La photo montre"),
        Language("es", "Spanish", "La imagen muestra"),
        Language("ru", "Russian", "На картинке изображен"),  # noqa: RUF001 (it is Cyrillic)
        Language("zh", "simplified Chinese", "图为"),
    )
}

# what Florence-2's processor makes of its task tokens
TASKS: Mapping[str, str] = {
    "<CAPTION>": "What does the image describe?",
    "<DETAILED_CAPTION>": "Describe in detail what is shown in the image.",
    "<MORE_DETAILED_CAPTION>": "Describe with a paragraph what is shown in the image.",
}
_PLACE = "{language}"
_TARGET = f"The target language is {_PLACE}."


def chosen(languages: Sequence[str], prefixes: Mapping[str, str] | None) -> list[Language]:
    """The languages of these codes, with the caller's prefixes where there are some.

    A code that the table does not know needs a prefix. ValueError, TypeError: by argument.
    """
    if isinstance(languages, str) or not isinstance(languages, Sequence):
        raise TypeError(
            f"fastvlm.{OP}: languages must be a list of codes, as ['en', 'de']; "
            f"got {describe(languages)}"
        )
    if not languages:
        raise fail(OP, "languages", "one code or more", languages)
    own = {} if prefixes is None else prefixes
    if not isinstance(own, Mapping) or not all(isinstance(text, str) for text in own.values()):
        raise fail(OP, "prefixes", "a mapping from language codes to text", prefixes)
    return [_language(code, own) for code in languages]


def _language(code: str, prefixes: Mapping[str, str]) -> Language:
    known = LANGUAGES.get(code) if isinstance(code, str) else None
    if known is None and code not in prefixes:
        wanted = f"of {', '.join(LANGUAGES)}, or have an entry in prefixes"
        raise fail(OP, "languages", wanted, code)
    if code not in prefixes:
        assert known is not None
        return known
    return Language(code, known.name if known else "", prefixes[code])


def prompt_texts(
    languages: Sequence[Language], prompt: str | Mapping[str, str], names_target: bool
) -> list[str]:
    """The prompt of each language, task tokens spelled out and {language} filled in.

    prompt: a task token of `TASKS`, or text, or one of these by language code. names_target: the
    model was trained with prompts that name the target language, so a task token does that too.
    ValueError: a language without a prompt, or without a name where the prompt wants one.
    """
    if not isinstance(prompt, (str, Mapping)):
        raise fail(OP, "prompt", "text, or a mapping from language codes to text", prompt)
    texts = []
    for language in languages:
        text = prompt if isinstance(prompt, str) else prompt.get(language.code)
        if not isinstance(text, str):
            raise fail(OP, "prompt", f"text for {language.code!r} too", prompt)
        if text in TASKS:
            text = f"{_TARGET} {TASKS[text]}" if names_target else TASKS[text]
        if _PLACE in text and not language.name:
            wanted = f"given for {language.code!r}, a language whose name is not known"
            raise fail(OP, "prompt", wanted, prompt)
        texts.append(text.replace(_PLACE, language.name))
    return texts
