"""The command line of ``python -m fastvlm check``."""

from __future__ import annotations

import argparse

from fastvlm.usage import MOST_TOKENS, whole_number


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="ID_OR_FOLDER",
        help="what transformers can load: real weights, and their processor or tokenizer "
        "(default: Florence-2-base's true shapes with random weights)",
    )
    parser.add_argument("--image", metavar="PATH", help="a photo (default: one of scikit-image's)")
    parser.add_argument(
        "--text",
        metavar="TEXT",
        action="append",
        help="a prompt; once more for more rows (default: two of different lengths, so that one "
        "is padded)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="default float32",
    )
    parser.add_argument("--beams", type=whole_number("--beams", 1, 64), default=3, help="default 3")
    parser.add_argument(
        "--new-tokens",
        type=whole_number("--new-tokens", 1, MOST_TOKENS),
        default=16,
        metavar="N",
        help="default 16",
    )
    parser.add_argument("--no-train", action="store_true", help="leave the training step out")
    parser.add_argument(
        "--exact", action="store_true", help="measure by float64, where memory allows a copy"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.add_argument("--small", action="store_true", help="a tiny model: seconds, for testing")
