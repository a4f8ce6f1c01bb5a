"""fastvlm.caption: images in many languages, encoded once, decoded together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, overload

from fastvlm.checks import fail
from fastvlm.compat.versions import needs_newer_transformers
from fastvlm.decoding.images import is_stream, to_pixels
from fastvlm.decoding.languages import OP, Language, chosen, prompt_texts
from fastvlm.decoding.writer import Asked, Writer
from fastvlm.features.kept import VisionFeatures, features_of

if TYPE_CHECKING:
    from fastvlm.decoding.images import Images

if why := needs_newer_transformers("fastvlm.caption"):
    raise ImportError(why)


@dataclass(frozen=True)
class Caption:
    """One caption.

    text: without special tokens, its first letter upper-cased; with the prefix where that was
        asked for.
    score: the summed log-probability of tokens over len(tokens) ** length_penalty (1 unless set:
        the mean), after logits processors: what beam search ranks by, higher is better. 0 for
        greedy and sampled captions of no tokens.
    language: its code. image: index of the image. tokens: the generated ids, the end token with
        them where one was generated, without the prefix and padding.
    """

    text: str
    score: float
    language: str
    image: int
    tokens: tuple[int, ...]


@overload
def caption(
    model: Any, processor: Any, images: Images, languages: Sequence[str], **settings: Any
) -> list[Caption]: ...


@overload
def caption(
    model: Any, processor: Any, images: Iterable[Any], languages: Sequence[str], **settings: Any
) -> Iterator[Caption]: ...


def caption(
    model: Any,
    processor: Any,
    images: Any,
    languages: Sequence[str],
    *,
    tokenizer: Any = None,
    prompt: str | Mapping[str, str] = "<CAPTION>",
    prefixes: Mapping[str, str] | None = None,
    num_beams: int | None = None,
    max_new_tokens: int = 128,
    keep_prefix: bool = False,
    seed: int | None = None,
    batch_size: int = 4,
    features: VisionFeatures | str | os.PathLike[str] | None = None,
    **generate_kwargs: Any,
) -> list[Caption] | Iterator[Caption]:
    """Captions of images in several languages; each image is seen once, all rows decode together.

    The tokens are those of one ``model.generate`` for each image and language with the prefix as
    decoder_input_ids: greedy and beams, in float32; in 16 bits a row rounds otherwise beside other
    rows, and sampling draws for all rows at once. Of a patched model the languages and beams that
    share a prompt read one copy of an image's keys and values (where prompts have unequally many
    languages, as few copies as leave equal groups).

    model: Florence-2 or Florenz, patched or not; its mode (train, eval) is left as it is.
    processor: has image_processor and tokenizer (transformers' Florence2Processor), of the prompts.
    images: path, PIL image, uint8 array [H, W, 3] or floating pixel_values [3, H, W], or a list of
        these, or pixel_values [images, 3, H, W]; all of one size once processed. Files and PIL
        images are turned as their EXIF says, and of several frames the first is taken. Any other
        iterable of them (a generator, a dataset) is read batch_size at a time, as the captions are
        asked for: its images may be endless, and of one size within a batch.
    languages: codes of `fastvlm.decoding.languages.LANGUAGES` (en, de, fr, es, ru, zh), or with an
        entry in prefixes.
    tokenizer: of the captions; default the processor's. Florenz has two: it must be given.
    prompt: "<CAPTION>", "<DETAILED_CAPTION>" or "<MORE_DETAILED_CAPTION>" (Florenz's name the
        language, so there is one a language), or text, in which {language} becomes its English
        name, or a mapping from codes to either.
    prefixes: by code, the words that a caption begins with, instead of the table's; "" for none.
    num_beams: default as the model's generation_config says. max_new_tokens: beside the prefix.
    keep_prefix: whether text begins with the prefix.
    seed: for sampling; the global random state is then left as it was. Of an iterable the batches
        take seed, seed + 1, ….
    batch_size: images of an iterable that decode together; a list decodes at once.
    features: a `fastvlm.VisionFeatures` of this model, or a folder: what the vision tower makes of
        an image is kept there, and read the next time.
    generate_kwargs: for generate(): do_sample, num_return_sequences, length_penalty, …. Its own
        logits processors and criteria see rows of all images and languages, shorter prefixes
        padded on the left with the start token, and no scores of earlier steps.

    Returns image by image, in the order of languages, num_return_sequences each, best first: a
    list, or of an iterable an iterator of them (`Caption.image` counts through).
    ValueError, TypeError: by argument, at once, but for images of an iterable, when they are
    reached. Source: arXiv 2503.09443 (prefixes, prompts, upper case).
    """
    writer = Writer(
        model,
        processor,
        tokenizer,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        generate_kwargs=generate_kwargs,
    )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise fail(OP, "batch_size", "a whole number, 1 or more", batch_size)
    spoken = chosen(languages, prefixes)
    texts = prompt_texts(spoken, prompt, names_target=writer.names_target)
    image_processor = getattr(processor, "image_processor", None)
    kept = features_of(features, model, processor)
    run = _Run(writer, image_processor, spoken, texts, keep_prefix, kept)
    if is_stream(images):
        return run.stream(images, batch_size, seed)
    return run.batch(images, 0, seed)


@dataclass
class _Run:
    """What one call of `caption` asks about every image."""

    writer: Writer
    image_processor: Any
    languages: list[Language]
    prompts: list[str]
    keep_prefix: bool
    features: VisionFeatures | None = None

    def batch(self, images: Any, first: int, seed: int | None) -> list[Caption]:
        """Of images that decode together; the first one has this index."""
        if self.features is None:
            pixels: Any = to_pixels(images, self.image_processor, first)
        else:
            pixels = self.features.pixel_values(images, first)
        asked = [Asked(text, one.prefix) for text, one in zip(self.prompts, self.languages)]
        captions = []
        for found in self.writer.write(pixels, asked, seed=seed):
            language = self.languages[found.place]
            shown = language.prefix if self.keep_prefix else ""
            text = self.writer.text(found.tokens, shown)
            captions.append(
                Caption(text, found.score, language.code, first + found.image, found.tokens)
            )
        return captions

    def stream(self, images: Iterable[Any], size: int, seed: int | None) -> Iterator[Caption]:
        rest, first, number = iter(images), 0, 0
        while batch := list(islice(rest, size)):
            yield from self.batch(batch, first, None if seed is None else seed + number)
            first, number = first + len(batch), number + 1
