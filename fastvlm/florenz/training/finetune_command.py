"""``fastvlm florenz finetune``."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastvlm.florenz.data.public import READERS, SPLITS, read_set
from fastvlm.florenz.data.shards import DataError
from fastvlm.florenz.training.command import rate, say, trainers
from fastvlm.florenz.training.sizes import SIZES
from fastvlm.usage import UsageError, whole_number

# of a step of all processes, as published: 8 processes with 32 images each
GLOBAL_BATCH = 256
_TRAIN_SPLITS = {"multi30k": "train", "multi30k-translation": "train", "coco": "train"}


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``florenz finetune``."""
    parser.add_argument("model", metavar="MODEL", help="a Florenz checkpoint: id or folder")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="new, or with --resume")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shards", metavar="PATH", help="a shard, or a folder of florenz data")
    source.add_argument("--set", choices=tuple(READERS), help="a public set, with --data")
    source.add_argument(
        "--world", action="store_true",
        help="the small world, captions in all six languages among its texts",
    )  # fmt: skip
    parser.add_argument("--data", metavar="PATH", help="with --set: its texts, as published")
    parser.add_argument("--images", metavar="FOLDER", help="with --set: its pictures")
    parser.add_argument("--split", help="with --set; default train")
    parser.add_argument(
        "--strict", action="store_true", help="with --shards: stop at what cannot be used"
    )
    _recipe(parser)
    parser.add_argument("--tokenizer", metavar="ID_OR_FOLDER", help="as for fastvlm caption")
    parser.add_argument("--processor", metavar="ID_OR_FOLDER", help="as for fastvlm caption")
    parser.add_argument("--unpatched", action="store_true", help="transformers alone")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--save-steps", type=whole_number("--save-steps", 1), metavar="N")
    parser.add_argument(
        "--report-to", default="none", metavar="NAME", help="tensorboard, wandb, ...; default none"
    )


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=whole_number("--steps", 1), default=5000, metavar="N", help="default 5000"
    )
    parser.add_argument(
        "--batch", type=whole_number("--batch", 1), default=32, metavar="N",
        help="images of one process; default 32",
    )  # fmt: skip
    parser.add_argument(
        "--targets", type=whole_number("--targets", 1), default=1, metavar="N",
        help="texts of an image in a step, which it is encoded for once; default 1, as published",
    )  # fmt: skip
    parser.add_argument(
        "--accumulate", type=whole_number("--accumulate", 1), metavar="N",
        help=f"batches of a step; default: so that all processes have {GLOBAL_BATCH} images",
    )  # fmt: skip
    parser.add_argument("--learning-rate", type=rate, default=5e-5, metavar="RATE",
                        help="the highest one; default 5e-5")  # fmt: skip
    parser.add_argument("--weight-decay", type=decay, default=0.05, metavar="W",
                        help="default 0.05")  # fmt: skip
    parser.add_argument(
        "--warm-up", type=whole_number("--warm-up", 0), default=100, metavar="N",
        help="steps, a fourth of all at most; default 100",
    )  # fmt: skip
    parser.add_argument(
        "--image-size", type=whole_number("--image-size", 32), metavar="PIXELS",
        help="default: as the checkpoint's processor says (published: 768)",
    )  # fmt: skip
    parser.add_argument("--seed", type=whole_number("--seed", 0), default=44595,
                        help="default 44595, as published")  # fmt: skip


def decay(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise UsageError("--weight-decay", "a number from 0 and below 1", repr(text))
    return number


def run(args: argparse.Namespace) -> int:
    """0: trained. UsageError: a model, data or a folder that cannot be used."""
    trainers("florenz finetune")
    from fastvlm.captioning.models import pretrained
    from fastvlm.florenz.training.finetuning import finetune
    from fastvlm.florenz.training.results import RESULTS
    from fastvlm.florenz.training.settings import FineTuning, world_size_of

    for name in ("data", "images", "split"):
        if args.set is None and getattr(args, name) is not None:
            raise UsageError(f"--{name}", "--set beside it", getattr(args, name))
    size = world_size_of(Path(args.model))
    source, data = _source(args, size)
    loaded = pretrained(
        args.model, args.tokenizer, "cpu", processor_id=args.processor, image_size=args.image_size
    )
    if loaded.model.config.model_type != "florenz":
        raise UsageError("MODEL", "a Florenz checkpoint", loaded.id)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = FineTuning(
        model=args.model, data=data, steps=args.steps, images=args.batch, targets=args.targets,
        accumulate=args.accumulate or max(1, round(GLOBAL_BATCH / (args.batch * processes))),
        learning_rate=args.learning_rate, weight_decay=args.weight_decay, warm_up=args.warm_up,
        image_size=args.image_size, seed=args.seed, patched=not args.unpatched, size=size,
    )  # fmt: skip
    since, out = time.perf_counter(), Path(args.out)
    try:
        _, trainer = finetune(
            settings, loaded, source, out, resume=args.resume, report_to=args.report_to,
            save_steps=args.save_steps, say=say,
        )  # fmt: skip
    except DataError as error:  # a picture is opened when its batch comes
        raise UsageError("finetune", "pictures that open", error) from None
    if trainer.is_world_process_zero():
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        seconds = round(time.perf_counter() - since, 1)
        results = {"settings": asdict(settings), "seconds": seconds, "log": log}
        (out / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        say(str(out / RESULTS))
    return 0


def _source(args: argparse.Namespace, size: str | None) -> tuple[Any, dict[str, Any]]:
    """Samples, and what settings.json says of them."""
    from fastvlm.florenz.data.indexed import IndexedShards
    from fastvlm.florenz.training import sources

    try:
        if args.shards is not None:
            shards = IndexedShards(args.shards, strict=args.strict)
            for what, why in shards.tally.skipped:
                say(f"skipped {what}: {why}")
            return sources.ShardSource(shards), {"shards": args.shards, "samples": len(shards)}
        if args.set is not None:
            if args.data is None:
                raise UsageError("--data", f"the files of {args.set}", "none")
            split = args.split or _TRAIN_SPLITS.get(args.set, SPLITS.get(args.set, ""))
            images = None if args.images is None else Path(args.images)
            found = read_set(args.set, Path(args.data), images, split, None)
            told = {"set": args.set, "data": args.data, "split": split, "samples": len(found.items)}
            return sources.SetSource(found), told
    except (DataError, ValueError) as error:
        argument = "--shards" if args.shards is not None else "--data"
        raise UsageError(argument, "data as it is published", error) from None
    if size is None:
        raise UsageError("--world", "a model of the small world", args.model)
    return sources.WorldSource(SIZES[size], args.seed), {"world": size}
