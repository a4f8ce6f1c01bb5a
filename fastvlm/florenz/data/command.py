"""``fastvlm florenz data``: make training data, or look through it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlm.florenz.data.annotations import Annotation, annotations_of
from fastvlm.florenz.data.shards import DataError, ShardSamples, write_shards
from fastvlm.tables import text_table
from fastvlm.usage import UsageError, whole_number

# of a fault each that is printed; the rest are counted
_SHOWN = 20


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``florenz data``."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--world", action="store_true", help="make data of the small world, which needs no download"
    )
    source.add_argument(
        "--from",
        dest="descriptions",
        metavar="FILE",
        help="make data of your own: lines of JSON with image (a path, from the file's folder on), "
        'description ({"en": ..., "de": ...}) and pairs ({"fr": [[english, french], ...]})',
    )
    source.add_argument(
        "--check", metavar="SHARDS", help="count what a shard or a folder of them holds"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where the shards go")
    parser.add_argument(
        "--images",
        type=whole_number("--images", 1),
        default=1000,
        help="with --world; default 1000",
    )
    parser.add_argument(
        "--size", type=whole_number("--size", 16), default=224, help="with --world; default 224"
    )
    parser.add_argument(
        "--per-shard",
        type=whole_number("--per-shard", 1),
        default=1000,
        metavar="N",
        help="images of a shard; default 1000",
    )
    parser.add_argument("--seed", type=whole_number("--seed", 0), default=0, help="default 0")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first sample that cannot be used"
    )


def run(args: argparse.Namespace) -> int:
    """0: done. 1: something was skipped. 2 (UsageError): nothing was done."""
    try:
        if args.check is not None:
            return _check(args)
        if args.out is None:
            raise UsageError("--out", "a folder for the shards", "nothing")
        skipped: list[tuple[str, str]] = []
        if args.world:
            from fastvlm.florenz.world.build import samples

            made = samples(args.images, size=args.size, seed=args.seed)
        else:
            made = _described(Path(args.descriptions), args.seed, args.strict, skipped)
        paths = write_shards(made, args.out, per_shard=args.per_shard)
    except DataError as error:
        print(f"fastvlm florenz data: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        raise UsageError("florenz data", "a source and a place that can be used", error) from None
    print(f"{len(paths)} shards in {args.out}")
    return _report(skipped)


def _check(args: argparse.Namespace) -> int:
    samples = ShardSamples(args.check, strict=args.strict)
    for _ in samples:
        pass
    tally = samples.tally
    rows = [(task, code, str(count)) for (task, code), count in sorted(tally.groups.items())]
    print(f"{tally.samples} samples in {len(samples.shards)} shards\n")
    print(text_table(("task", "language", "texts"), rows))
    return _report(tally.skipped)


def _report(skipped: list[tuple[str, str]]) -> int:
    for what, why in skipped[:_SHOWN]:
        print(f"skipped {what}: {why}", file=sys.stderr)
    if len(skipped) > _SHOWN:
        print(f"and {len(skipped) - _SHOWN} more", file=sys.stderr)
    return 1 if skipped else 0


def _described(
    file: Path, seed: int, strict: bool, skipped: list[tuple[str, str]]
) -> Iterator[tuple[Any, list[Annotation]]]:
    import random

    from PIL import Image

    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                pairs = {code: [(a, b) for a, b in some] for code, some in record["pairs"].items()}
                chance = random.Random(f"{seed}/{number}")
                annotations = annotations_of(record["description"], pairs, chance)
                image = Image.open(file.parent / record["image"]).convert("RGB")
            except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
                why = f"{type(error).__name__}: {error}"
                if strict:
                    raise DataError(f"{file}:{number}: {why}") from None
                skipped.append((f"{file}:{number}", why))
                continue
            if annotations:
                yield image, annotations
            else:
                skipped.append((f"{file}:{number}", "no text that is long enough"))
