"""Words, as CIDEr counts them: by Stanford's tokenizer, by Stanza, or by a rule of our own."""

# ruff: noqa: RUF001 (marks of other scripts)

from __future__ import annotations

import re
import shutil
import string
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

# what COCO's evaluation does, what arXiv 2503.09443 does to Crossmodal-3600, and neither
TOKENIZERS = ("ptb", "stanza", "words")
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+(?:['’-][^\W\u3400-\u9fff]+)*")
_MARKS = str.maketrans("", "", string.punctuation + "·。、，！？；：“”‘’…„–—«»¿¡《》（）")


class Missing(Exception):
    """A measure that cannot be taken on this machine, or of this language; the text says why."""


def words(texts: Sequence[str]) -> list[str]:
    """Lower case, compatibility forms composed (NFKC), words with a space between them; a Chinese
    character is a word, marks are left out. Needs nothing, and is none of the published ways."""
    return [" ".join(_WORD.findall(unicodedata.normalize("NFKC", text).lower())) for text in texts]


def tokenized(texts: Sequence[str], tokenizer: str, language: str) -> list[str]:
    """Texts as words with a space between them. Missing: what the tokenizer needs is not here."""
    if tokenizer == "ptb":
        return _ptb(texts)
    if tokenizer == "stanza":
        return [_stanza_words(_stanza(language), text) for text in texts]
    return words(texts)


def need_java() -> None:
    if shutil.which("java") is None:
        raise Missing("java is not installed (Debian: apt install default-jre-headless)")


def _ptb(texts: Sequence[str]) -> list[str]:
    try:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError:
        raise Missing("pycocoevalcap is not installed (pip install 'fastvlm[evaluate]')") from None
    need_java()
    # it splits its input at line feeds, and its rows by number
    given = {i: [{"caption": " ".join(text.split())}] for i, text in enumerate(texts)}
    found = PTBTokenizer().tokenize(given)
    return [found[i][0] for i in range(len(texts))]


@cache
def _stanza(language: str) -> Any:
    try:
        import stanza
    except ImportError:
        raise Missing("stanza is not installed (pip install stanza)") from None
    try:
        return stanza.Pipeline(language, processors="tokenize", download_method=None, verbose=False)
    except Exception as error:  # of a missing model it raises several
        why = str(error).strip().splitlines()[0]
        raise Missing(f"stanza has no model of {language} here ({why})") from None


def _stanza_words(pipeline: Any, text: str) -> str:
    document = pipeline(unicodedata.normalize("NFKC", text))
    found = (word.text for sentence in document.sentences for word in sentence.words if word.text)
    return " ".join(word.translate(_MARKS).lower() for word in found).strip()
