"""What a model writes about a set, and which of two translations it finds likelier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastvlm
from fastvlm.decoding.images import to_pixels
from fastvlm.decoding.writer import Asked, Writer
from fastvlm.florenz.data.annotations import (
    CAPTION,
    TRANSLATE,
    TRANSLATION,
    Annotation,
    marked_prompt,
    spelled_prompt,
)
from fastvlm.florenz.data.sets import EvaluationSet, Item
from fastvlm.florenz.evaluation.records import Answer
from fastvlm.florenz.losses import image_tokens_of, text_losses
from fastvlm.florenz.training.batches import Words


@dataclass(frozen=True)
class Writing:
    """How answers are written. prompt: of captions, as `fastvlm.caption` takes it. prefix: whether
    captions begin with the first words of their language. batch: pictures captioned together."""

    beams: int = 4
    new_tokens: int = 128
    prefix: bool = True
    prompt: str | Mapping[str, str] = "<CAPTION>"
    batch: int = 4


def answers(loaded: Any, asked: EvaluationSet, how: Writing) -> Iterator[Answer]:
    """An answer to each item in each language it has references in, item by item.

    loaded: `fastvlm.load`'s, or that of ``fastvlm caption``. ValueError: a picture that does not
    open.
    """
    if asked.task == CAPTION:
        yield from _captions(loaded, asked, how)
    else:
        yield from _translations(loaded, asked, how)


def _captions(loaded: Any, asked: EvaluationSet, how: Writing) -> Iterator[Answer]:
    languages = asked.languages
    own = asked.prefixes or {}
    prefixes = {
        code: own[code] if how.prefix else "" for code in languages if own or not how.prefix
    }
    found = fastvlm.caption(
        loaded.model, loaded.processor, (item.image for item in asked.items), languages,
        tokenizer=loaded.tokenizer, prompt=how.prompt, prefixes=prefixes,
        keep_prefix=asked.keep_prefix, num_beams=how.beams, max_new_tokens=how.new_tokens,
        batch_size=how.batch,
    )  # fmt: skip
    for one in found:
        item = asked.items[one.image]
        if one.language in item.references:
            yield _answer(one.image, item, one.language, one.text)


def _answer(number: int, item: Item, code: str, text: str, right: bool | None = None) -> Answer:
    image = str(item.image) if isinstance(item.image, Path) else item.name
    references = tuple(item.references[code])
    return Answer(number, image, code, text, references, item.source, right, item.split)


def _translations(loaded: Any, asked: EvaluationSet, how: Writing) -> Iterator[Answer]:
    """A picture has a prompt of its own, so that its languages decode together, but no others."""
    pictures = loaded.processor.image_processor
    writer = Writer(
        loaded.model, loaded.processor, loaded.tokenizer, num_beams=how.beams,
        max_new_tokens=how.new_tokens,
    )  # fmt: skip
    for number, item in enumerate(asked.items):
        codes = list(item.references)
        pixels = to_pixels([item.image], pictures, number)
        prompts = [Asked(_translation_prompt(item, code)) for code in codes]
        choices = _choices(loaded, item, pixels[0]) if item.wrong else {}
        for one in writer.write(pixels, prompts):
            code = codes[one.place]
            yield _answer(number, item, code, writer.text(one.tokens), choices.get(code))


def _translation_prompt(item: Item, code: str) -> str:
    return spelled_prompt(marked_prompt(code, TRANSLATE, item.source or ""))


def _choices(loaded: Any, item: Item, pixels: Any) -> dict[str, bool]:
    """By language: whether the mean loss of the right translation's tokens is below the wrong
    one's, so its perplexity too."""
    words = Words(loaded.processor.tokenizer, loaded.tokenizer)
    texts = [
        Annotation(TRANSLATION, code, marked_prompt(code, TRANSLATE, item.source or ""), text)
        for code, wrong in item.wrong.items()
        for text in (item.references[code][0], wrong)
    ]
    tokens = image_tokens_of(loaded.model, *pixels.shape[-2:])
    (found,) = text_losses(loaded.model, words, [(pixels, texts)], tokens)
    return {code: found[2 * i] < found[2 * i + 1] for i, code in enumerate(item.wrong)}
