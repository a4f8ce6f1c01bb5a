"""The arguments of the demo, and where its results go."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastvlm.usage import MOST_TOKENS, UsageError, whole_number

DEFAULT_OUT = "fastvlm-demo"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", metavar="PATH", help="a photo (default: one of scikit-image's)")
    parser.add_argument(
        "--model",
        metavar="ID_OR_FOLDER",
        help="real Florence-2 weights, e.g. microsoft/Florence-2-base "
        "(default: Florence-2-base's true shapes with random weights)",
    )
    parser.add_argument(
        "--beams", type=whole_number("--beams", 1, 64), default=3, help="default 3, as Florence-2"
    )
    parser.add_argument(
        "--new-tokens",
        # one token is the prefill's: two are the least that leaves something to decode
        type=whole_number("--new-tokens", 2, MOST_TOKENS),
        default=32,
        metavar="N",
        help="default 32",
    )
    parser.add_argument(
        "--rounds", type=whole_number("--rounds", 1), default=3, help="timed runs, default 3"
    )
    parser.add_argument(
        "--threads", type=whole_number("--threads", 1), metavar="N", help="default: PyTorch's own"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help=f"where the chart and the figures go (default: {DEFAULT_OUT})",
    )
    parser.add_argument("--small", action="store_true", help="a tiny model: seconds, for testing")


def out_folder(given: str | None) -> Path:
    """The folder for the results, made if need be."""
    folder = Path(DEFAULT_OUT if given is None else given)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        given = f"{folder} ({error.strerror})"
        raise UsageError("--out", "a folder that can be written", given) from None
    return folder
