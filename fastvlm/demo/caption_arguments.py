"""The command line of ``python -m fastvlm caption``."""

from __future__ import annotations

import argparse

from fastvlm.demo.arguments import MOST_TOKENS, whole_number

# the first words of a language take positions too, at worst a byte each
PREFIX_TOKENS = 63


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image",
        metavar="PATH",
        action="append",
        help="a photo; once more for more of them (default: one of scikit-image's)",
    )
    parser.add_argument(
        "--lang",
        metavar="CODES",
        default="en,de,fr,es,ru,zh",
        help="languages, with commas between them (default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        metavar="ID_OR_FOLDER",
        help="real weights: a Florence-2, or a folder with a Florenz model, its processor and, "
        "below it, decoder_tokenizer (default: Florence-2-base's true shapes with random weights, "
        "whose text means nothing)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="ID_OR_FOLDER",
        help="of a Florenz model's captions, where it does not lie in its decoder_tokenizer",
    )
    parser.add_argument(
        "--prompt",
        default="<CAPTION>",
        help="a task token of Florence-2, or text, where {language} is the language's name",
    )
    parser.add_argument("--beams", type=whole_number("--beams", 1, 64), default=3, help="default 3")
    parser.add_argument(
        "--new-tokens",
        type=whole_number("--new-tokens", 1, MOST_TOKENS - PREFIX_TOKENS),
        default=32,
        metavar="N",
        help="at most, beside the first words of a language; default 32",
    )
    parser.add_argument(
        "--keep-prefix", action="store_true", help="print the first words of a language too"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.add_argument("--small", action="store_true", help="a tiny model: seconds, for testing")
