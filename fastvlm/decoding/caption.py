"""fastvlm.caption: images in many languages, encoded once, decoded together."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import gcd
from typing import Any

import torch
from torch import Tensor

from fastvlm.checks import fail
from fastvlm.compat.versions import without_transformers_5
from fastvlm.decoding.encode import Encoded, encode_once
from fastvlm.decoding.images import to_pixels
from fastvlm.decoding.languages import OP, Language, chosen, prompt_texts
from fastvlm.decoding.prefixes import left_padded, may_pad, row_positions
from fastvlm.decoding.scores import TokenScores, ended

if why := without_transformers_5("fastvlm.caption"):
    raise ImportError(why)

# what caption() makes itself, or what would make rows depend on each other
_REFUSED = (
    "input_ids", "inputs", "inputs_embeds", "pixel_values", "attention_mask", "decoder_input_ids",
    "decoder_attention_mask", "encoder_outputs", "past_key_values", "return_dict_in_generate",
    "output_scores", "output_logits", "max_length", "custom_generate", "assistant_model",
    "prompt_lookup_num_tokens", "prompt_of_target", "image_of_prompt",
)  # fmt: skip


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
    **generate_kwargs: Any,
) -> list[Caption]:
    """Captions of images in several languages; each image is seen once, all rows decode together.

    The tokens are those of one ``model.generate`` for each image and language with the prefix as
    decoder_input_ids: greedy and beams, in float32; in 16 bits a row rounds otherwise beside other
    rows, and sampling draws for all rows at once. Of a patched model the languages and beams that
    share a prompt read one copy of an image's keys and values (where prompts have unequally many
    languages, as few copies as leave equal groups).

    model: Florence-2 or Florenz, patched or not; its mode (train, eval) is left as it is.
    processor: has image_processor and tokenizer (transformers' Florence2Processor), of the prompts.
    images: path, PIL image, uint8 array [H, W, 3] or floating pixel_values [3, H, W], or a list of
        these, or pixel_values [images, 3, H, W]; all of one size once processed.
    languages: codes of `fastvlm.decoding.languages.LANGUAGES` (en, de, fr, es, ru, zh), or with an
        entry in prefixes.
    tokenizer: of the captions; default the processor's. Florenz has two: it must be given.
    prompt: "<CAPTION>", "<DETAILED_CAPTION>" or "<MORE_DETAILED_CAPTION>" (Florenz's name the
        language, so there is one a language), or text, in which {language} becomes its English
        name, or a mapping from codes to either.
    prefixes: by code, the words that a caption begins with, instead of the table's; "" for none.
    num_beams: default as the model's generation_config says. max_new_tokens: beside the prefix.
    keep_prefix: whether text begins with the prefix.
    seed: for sampling; the global random state is then left as it was.
    generate_kwargs: for generate(): do_sample, num_return_sequences, length_penalty, …. Its own
        logits processors and criteria see rows of all images and languages, shorter prefixes
        padded on the left with the start token, and no scores of earlier steps.

    Returns image by image, in the order of languages, num_return_sequences each, best first.
    ValueError, TypeError: by argument. Source: arXiv 2503.09443 (prefixes, prompts, upper case).
    """
    _check(model, max_new_tokens, num_beams, generate_kwargs)
    spoken = chosen(languages, prefixes)
    words, target_words = _tokenizers(model, processor, tokenizer)
    is_florenz = getattr(model.config, "model_type", None) == "florenz"
    texts = prompt_texts(spoken, prompt, names_target=is_florenz)
    options = _Options(model, generate_kwargs, num_beams, max_new_tokens)
    if options.value("stop_strings") is not None:
        options.kwargs["tokenizer"] = target_words
    start = _start_ids(options, target_words)
    targets = [
        _Target(place, language, start + _ids(target_words, language.prefix), texts.index(text))
        for place, (language, text) in enumerate(zip(spoken, texts))
    ]
    used = sorted({target.prompt for target in targets})
    for target in targets:
        target.prompt = used.index(target.prompt)
    pixels = to_pixels(images, getattr(processor, "image_processor", None))
    prompts = [_prompt_ids(words, texts[index]) for index in used]
    encoded = encode_once(model, pixels, prompts)
    found: list[tuple[int, int, int, list[int], float]] = []
    with _seeded(seed, model.device):
        for group in _together(model, options, targets):
            found += _decode(model, encoded, group, options)
    captions = []
    for image, place, _, tokens, score in sorted(found, key=lambda row: row[:3]):
        target = targets[place]
        shown = [*target.begun[len(start) :], *tokens] if keep_prefix else tokens
        text = target_words.decode(shown, skip_special_tokens=True).strip()
        text = text[:1].upper() + text[1:]
        captions.append(Caption(text, score, target.language.code, image, tuple(tokens)))
    return captions


@dataclass
class _Target:
    """A language to write in: the ids that a row begins with, and which prompt it reads."""

    place: int
    language: Language
    begun: list[int]
    prompt: int


class _Options:
    """What generate() is called with, and what follows from that and the model's defaults."""

    def __init__(
        self, model: Any, kwargs: dict[str, Any], num_beams: int | None, max_new_tokens: int
    ) -> None:
        self.kwargs = dict(kwargs)
        self.defaults = model.generation_config
        self.config = copy.deepcopy(self.kwargs.pop("generation_config", None))
        ours: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "return_dict_in_generate": True,
            "output_scores": True,
        }  # fmt: skip
        if num_beams is not None:
            ours["num_beams"] = num_beams
        if self.config is None:
            self.kwargs.update(ours)
        else:
            self.config.update(**ours)
            self.kwargs["generation_config"] = self.config

    def value(self, name: str, default: Any = None) -> Any:
        """As generate() will find it: its arguments, the config given, the model's."""
        for source in (self.kwargs, vars(self.config or object), vars(self.defaults)):
            if source.get(name) is not None:
                return source[name]
        return default

    @property
    def end_ids(self) -> list[int]:
        ids = self.value("eos_token_id", [])
        return [ids] if isinstance(ids, int) else [int(token) for token in ids]


def _check(model: Any, max_new_tokens: Any, num_beams: Any, kwargs: dict[str, Any]) -> None:
    config = getattr(model, "config", None)
    parts = ("generate", "get_image_features", "get_encoder", "get_input_embeddings")
    if not getattr(config, "is_encoder_decoder", False) or not all(
        hasattr(model, name) for name in parts
    ):
        raise TypeError(
            f"fastvlm.{OP}: model must be a Florence-2 or Florenz model with its head; "
            f"got {type(model).__name__}"
        )
    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        optional = name == "num_beams" and value is None
        if not optional and (not isinstance(value, int) or value < 1):
            raise fail(OP, name, "a whole number, 1 or more", value)
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            wanted = "left out (caption() makes it, or max_new_tokens and images say it)"
            raise fail(OP, name, wanted, kwargs[name])


def _tokenizers(model: Any, processor: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Of the prompts and of the captions."""
    words = getattr(processor, "tokenizer", None)
    if words is None:
        raise fail(OP, "processor", "one with a tokenizer", processor)
    if tokenizer is None and model.config.model_type == "florenz":
        wanted = "given: the captions of Florenz have a vocabulary of their own"
        raise fail(OP, "tokenizer", wanted, None)
    return words, words if tokenizer is None else tokenizer


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    # as Florence2Processor does: special tokens written out, none added
    return _ids(tokenizer, f"{tokenizer.bos_token or ''}{text}{tokenizer.eos_token or ''}")


def _start_ids(options: _Options, tokenizer: Any) -> list[int]:
    """The decoder's start token, then bos, which all these models are trained to write first."""
    start = options.value("decoder_start_token_id", options.value("bos_token_id"))
    if start is None:
        raise fail(OP, "model", "one whose generation_config has a decoder_start_token_id", None)
    bos = tokenizer.bos_token_id
    return [start] if bos is None or bos == start else [start, bos]


def _together(model: Any, options: _Options, targets: list[_Target]) -> list[list[_Target]]:
    """Targets that one generate() call may write: all, or those of one length of prefix.

    A min_length counts the padding. A row of the start token alone (no bos, no prefix) would look
    like padding to a ban on n-grams.
    """
    lengths = {len(target.begun) for target in targets}
    exact = may_pad(model) and min(lengths) > 1
    exact &= not options.value("min_length")
    if len(lengths) == 1 or exact:
        return [targets]
    return [[t for t in targets if len(t.begun) == length] for length in sorted(lengths)]


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Any:
    if seed is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _decode(
    model: Any, encoded: Encoded, targets: list[_Target], options: _Options
) -> list[tuple[int, int, int, list[int], float]]:
    """One generate(): (image, place of the language, rank, tokens, score) of each sequence."""
    from transformers import StoppingCriteriaList
    from transformers.modeling_outputs import BaseModelOutput

    targets = sorted(targets, key=lambda target: target.prompt)
    rows = [(image, target) for image in range(encoded.num_images) for target in targets]
    read = [image * encoded.num_prompts + target.prompt for image, target in rows]
    ids, mask, pads = left_padded([target.begun for _, target in rows], encoded.states.device)
    given = {"decoder_input_ids": ids}
    if mask is not None:
        given["decoder_attention_mask"] = mask
    index = _encoder_rows(model, read, ids.device)
    states, states_mask = encoded.states, encoded.mask
    if index.tolist() != list(range(states.shape[0])):
        states, states_mask = states.index_select(0, index), states_mask.index_select(0, index)
    noted = TokenScores(beams=options.value("num_beams", 1) > 1)
    kwargs = dict(options.kwargs)
    criteria = [*(kwargs.pop("stopping_criteria", None) or ()), noted]
    with row_positions(model, pads):
        output = model.generate(
            # not encoded again: it says how many rows there are, and what the prompts were
            input_ids=encoded.input_ids[read],
            encoder_outputs=BaseModelOutput(states),
            attention_mask=states_mask,
            stopping_criteria=StoppingCriteriaList(criteria),
            **given,
            **kwargs,
        )
    begun, ranks = ids.shape[1], output.sequences.shape[0] // len(rows)
    may_stop = len(criteria) > 1 or options.value("stop_strings") is not None
    filler = options.value("pad_token_id") if may_stop else None
    penalty = options.value("length_penalty", 1.0)
    scores = getattr(output, "sequences_scores", None)
    found = []
    for row, sequence in enumerate(output.sequences.tolist()):
        tokens = ended(sequence[begun:], options.end_ids, filler)
        score = float(scores[row]) if scores is not None else noted.of(row, len(tokens), penalty)
        image, target = rows[row // ranks]
        found.append((image, target.place, row % ranks, tokens, score))
    return found


def _encoder_rows(model: Any, read: list[int], device: torch.device) -> Tensor:
    """The encoder's rows to hand to generate(), where decoder row r reads row read[r].

    A patched model lets equally many neighbours read one row, so a row stands once for them; where
    prompts have unequally many languages it is repeated as little as that allows.
    """
    from fastvlm.patching.language_model import shares_states

    readers = 1
    if any(shares_states(module) for module in model.modules()):
        readers = gcd(*(len(list(run)) for _, run in groupby(read)))
    return torch.tensor(read[::readers], device=device)
