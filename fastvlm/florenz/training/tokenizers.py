"""Tokenizers of the small world: one of the prompts, one of the texts that the decoder writes.

A word is a token, a Chinese character is one, and a mark is one; a space belongs to the word behind
it, as in Gemma's, so that decoding gives the very text. Special tokens are BART's for the prompts,
Gemma's for the texts (arXiv 2503.09443: two vocabularies).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from fastvlm.florenz.data.annotations import TRANSLATE, marked_prompt, spelled_prompt
from fastvlm.florenz.world.grammar import LANGUAGES, texts

# in the order of their ids
PROMPT_SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
TEXT_SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
IMAGE = "<image>"
_UNKNOWN = "<unk>"
_HAN = "[\u3400-\u9fff]"


@cache
def prompt_tokenizer(*, bare: bool = False) -> Any:
    """Of English sentences and of the prompts; <image> is its last token. bare: as `spelled_prompt`
    has it."""
    asked = [spelled_prompt(marked_prompt(code, task), bare=bare) for code in LANGUAGES
             for task in ("<CAPTION>", TRANSLATE)]  # fmt: skip
    return _tokenizer(
        PROMPT_SPECIAL, [*asked, *_spoken("en")], extra_special_tokens={"image_token": IMAGE}
    )


@cache
def text_tokenizer() -> Any:
    """Of sentences in all six languages, whichever of them a decoder learns first."""
    return _tokenizer(TEXT_SPECIAL, [text for code in LANGUAGES for text in _spoken(code)])


def _spoken(code: str) -> Iterable[str]:
    # with a space in front, as words have it within a sentence
    return (form for text in texts(code) for form in (text, f" {text}"))


def _tokenizer(special: dict[str, str], corpus: Iterable[str], **more: Any) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="never"),
            pre_tokenizers.Split(Regex(_HAN), "isolated"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    words = sorted({word for text in corpus for word, _ in split.pre_tokenize_str(text)})
    known = [*special.values(), _UNKNOWN, *words]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token=_UNKNOWN))
    backend.pre_tokenizer = split
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=_UNKNOWN, clean_up_tokenization_spaces=False,
        **special, **more,
    )  # fmt: skip
