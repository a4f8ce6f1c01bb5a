"""The command line of ``python -m fastvlm caption``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from fastvlm.usage import MOST_TOKENS, UsageError, whole_number

if TYPE_CHECKING:
    from fastvlm.captioning.models import Loaded
    from fastvlm.features.kept import VisionFeatures

# the first words of a language take positions too, at worst a byte each
PREFIX_TOKENS = 63
LANGUAGE_CODES = "en,de,fr,es,ru,zh"
NEW_TOKENS = 32


BITS = ("int8", "bf16")


def add(parser: argparse.ArgumentParser) -> None:
    _pictures(parser)
    _asked(parser)
    _model(parser)
    _output(parser)


def bits_of(args: argparse.Namespace) -> str | None:
    """What --int8 or --bf16 asks for; None where neither is set."""
    return next((bits for bits in BITS if getattr(args, bits)), None)


def check_bits(args: argparse.Namespace) -> None:
    """UsageError: --int8 or --bf16 on a GPU, or on a CPU that does not multiply so; or both."""
    bits = bits_of(args)
    if bits is None:
        return
    name = f"--{bits}"
    if args.device != "cpu":
        raise UsageError(name, "left out on a GPU", "set")
    if args.int8 and args.bf16:
        raise UsageError("--bf16", "left out beside --int8", "set")
    from fastvlm.nn.compute import unavailable

    if why := unavailable(bits):
        raise UsageError(name, "left out here", f"set, and {why}")


def patched(args: argparse.Namespace, loaded: Loaded) -> Loaded:
    """The model patched as was asked, which belongs to its name: its words may be others."""
    import fastvlm

    bits = bits_of(args)
    fastvlm.patch(loaded.model, weights=bits, compute=bits)
    if bits is None:
        return loaded
    return replace(loaded, name=f"{loaded.name}, {bits}", id=f"{loaded.id}, {bits}")


def features(args: argparse.Namespace, loaded: Loaded) -> VisionFeatures | None:
    """--features. UsageError: a folder of something else."""
    if args.features is None:
        return None
    from fastvlm.features.kept import VisionFeatures

    try:
        return VisionFeatures(args.features, loaded.model, loaded.processor.image_processor)
    except ValueError as error:
        wanted, _, given = str(error).partition("folder must be ")[2].partition("; got ")
        raise UsageError("--features", wanted or "a folder", given or str(error)) from None


def _pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="*",
        help="with --out: a folder (and all below it), pictures, or WebDataset shards, also as "
        "'shards/{0000..0099}.tar'",
    )
    parser.add_argument(
        "--image",
        metavar="PATH",
        action="append",
        help="without --out: a photo; once more for more of them (default: one of scikit-image's)",
    )


def _asked(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task",
        "--prompt",
        dest="tasks",
        metavar="TASK",
        action="append",
        help="a task of Florence-2 (<CAPTION>, <OD>, <OCR_WITH_REGION>, "
        "'<OPEN_VOCABULARY_DETECTION>a cat', …), or text, where {language} is the language's name; "
        "with --out once more for more of them (default: <CAPTION>)",
    )
    parser.add_argument(
        "--lang",
        metavar="CODES",
        help=f"languages of descriptions, with commas between them (default: {LANGUAGE_CODES}; "
        "with --out as the model likes, without first words of a language)",
    )
    parser.add_argument("--beams", type=whole_number("--beams", 1, 64), default=3, help="default 3")
    parser.add_argument(
        "--new-tokens",
        type=whole_number("--new-tokens", 1, MOST_TOKENS - PREFIX_TOKENS),
        metavar="N",
        help="at most, beside the first words of a language; "
        f"default {NEW_TOKENS}, with --out as the longest of the tasks needs",
    )
    parser.add_argument(
        "--keep-prefix", action="store_true", help="print the first words of a language too"
    )


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="ID_OR_FOLDER",
        help="real weights: a Florence-2 of Microsoft's or transformers' layout, or a Florenz "
        "model, with its processor and, below it, decoder_tokenizer (default: Florence-2-base's "
        "true shapes with random weights, whose text means nothing)",
    )
    parser.add_argument(
        "--processor",
        metavar="ID_OR_FOLDER",
        help="of images and prompts, where it does not lie beside the model",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="ID_OR_FOLDER",
        help="of a Florenz model's captions, where it does not lie in its decoder_tokenizer",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights and the arithmetic; default float32",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="multiply in int8 where it is faster, and read the weights of decoding as int8 "
        "(on a CPU): sooner, with now and then another word",
    )
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="the same in bfloat16, closer to float32 (on a CPU with AMX or AVX-512 BF16)",
    )
    parser.add_argument(
        "--features",
        metavar="DIR",
        help="keep what the vision tower makes of each picture there, and read it the next time: "
        "for other tasks and languages (1.2 MB a picture with Florence-2-base)",
    )
    parser.add_argument("--small", action="store_true", help="a tiny model: seconds, for testing")


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.add_argument(
        "--out", metavar="FILE.jsonl", help="where the lines go, one a picture, task and language"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with --out, where there is one already"
    )
    parser.add_argument("--retry", action="store_true", help="--resume, and try again what failed")
    parser.add_argument(
        "--txt", action="store_true", help="also write the text into a .txt beside each picture"
    )
    parser.add_argument(
        "--draw", metavar="DIR", help="also draw what was found into copies of the pictures"
    )
    parser.add_argument(
        "--webdataset",
        metavar="DIR",
        help="also write shards of pictures and what was said of them",
    )
    parser.add_argument("--report", metavar="FILE.html", help="also write a page that shows it all")
    parser.add_argument(
        "--batch-size",
        type=whole_number("--batch-size", 1),
        metavar="N",
        help="pictures that decode together (default: as memory allows)",
    )
    parser.add_argument(
        "--workers",
        type=whole_number("--workers", 1),
        default=2,
        metavar="N",
        help="threads that open pictures beside the model; default 2",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
