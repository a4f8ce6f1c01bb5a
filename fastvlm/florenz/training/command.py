"""``fastvlm florenz train`` and ``fastvlm florenz emergence``."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from fastvlm.florenz.training.settings import PROMPTS
from fastvlm.florenz.training.sizes import DECODERS, MULTILINGUALITY, SIZES
from fastvlm.usage import UsageError, whole_number

_WANTED = "what pip install 'fastvlm[florenz]' brings"


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``florenz train``."""
    parser.add_argument("--out", metavar="FOLDER", required=True, help="new, or with --resume")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny", help="default tiny")
    parser.add_argument(
        "--decoder", choices=DECODERS, default="frozen",
        help="frozen: Gemma-2's form, a language model first, then frozen but for its "
        "cross-attention and embedding; scratch: BART's form, trained with the rest; "
        "default frozen",
    )  # fmt: skip
    parser.add_argument(
        "--languages", type=int, choices=tuple(MULTILINGUALITY), default=6,
        help="how many a frozen decoder has read; default 6",
    )  # fmt: skip
    parser.add_argument("--steps", type=whole_number("--steps", 1), metavar="N")
    parser.add_argument(
        "--language-steps", type=whole_number("--language-steps", 1), metavar="N",
        help="of the language model; defaults are the size's",
    )  # fmt: skip
    parser.add_argument(
        "--vision-steps", type=whole_number("--vision-steps", 1), metavar="N",
        help="of the vision tower",
    )  # fmt: skip
    parser.add_argument(
        "--accumulate", type=whole_number("--accumulate", 1), default=1, metavar="N",
        help="batches of a step; default 1",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", choices=PROMPTS, default="named",
        help="bare: prompts of captions do not name the language, so that only the first words of "
        "a caption say which it is; default named, as published",
    )  # fmt: skip
    parser.add_argument("--seed", type=whole_number("--seed", 0), default=0, help="default 0")
    parser.add_argument("--learning-rate", type=rate, metavar="RATE", help="the highest one")
    parser.add_argument(
        "--start-from", metavar="FOLDER",
        help="another run of the size, whose vision tower is taken, and its language model where "
        "that has read the same languages",
    )  # fmt: skip
    parser.add_argument("--unpatched", action="store_true", help="transformers alone")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--save-steps", type=whole_number("--save-steps", 1), metavar="N")
    parser.add_argument(
        "--report-to", default="none", metavar="NAME", help="tensorboard, wandb, ...; default none"
    )
    _measured(parser)


def rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1:
        raise UsageError("--learning-rate", "a number between 0 and 1", repr(text))
    return rate


def add_emergence(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``florenz emergence``."""
    parser.add_argument("run", metavar="FOLDER", help="of florenz train")
    _measured(parser)


def _measured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scenes", type=whole_number("--scenes", 1), default=100, metavar="N",
        help="pictures that are captioned at the end; default 100",
    )  # fmt: skip
    parser.add_argument("--beams", type=whole_number("--beams", 1, 64), default=1, help="default 1")


def run(args: argparse.Namespace) -> int:
    """0: trained and measured. UsageError: arguments or a folder that cannot be used."""
    trainers("florenz train")
    from fastvlm.florenz.training.run import train
    from fastvlm.florenz.training.settings import Settings

    size = SIZES[args.size]
    settings = Settings(
        size=args.size, decoder=args.decoder, languages=args.languages, seed=args.seed,
        steps=args.steps or size.steps, language_steps=args.language_steps or size.language_steps,
        vision_steps=args.vision_steps or size.vision_steps,
        patched=not args.unpatched, accumulate=args.accumulate,
        learning_rate=args.learning_rate, start=args.start_from, prompts=args.prompts,
    )  # fmt: skip
    since = time.perf_counter()
    model, trainer = train(
        settings, Path(args.out), resume=args.resume, report_to=args.report_to,
        save_steps=args.save_steps, say=say,
    )  # fmt: skip
    if trainer.is_world_process_zero():
        seconds = round(time.perf_counter() - since, 1)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        measured = {"settings": asdict(settings), "seconds": seconds, "log": log}
        _measure(model.eval(), args, Path(args.out), measured)
    return 0


def say(line: str) -> None:
    print(line, flush=True)


def trainers(what: str) -> None:
    """transformers' Trainer without its progress bars. UsageError: a package that is missing."""
    try:
        import_module("accelerate")  # transformers' Trainer asks for it late
        from transformers.utils import logging

        import_module("fastvlm.florenz.training.run")
    except ImportError as error:
        raise UsageError(what, _WANTED, str(error)) from None
    logging.disable_progress_bar()


def run_emergence(args: argparse.Namespace) -> int:
    """0: measured. UsageError: a folder without a trained model."""
    from fastvlm import patch
    from fastvlm.florenz import FlorenzForConditionalGeneration
    from fastvlm.florenz.training.results import RESULTS

    out = Path(args.run)
    try:
        before = json.loads((out / RESULTS).read_text(encoding="utf-8"))
        model = FlorenzForConditionalGeneration.from_pretrained(out, attn_implementation="eager")
        kept = {name: before[name] for name in ("settings", "seconds", "log")}
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError("FOLDER", "a folder of a finished florenz train", why[0]) from None
    if kept["settings"]["patched"]:
        patch(model)
    _measure(model.eval(), args, out, kept)
    return 0


def _measure(model: Any, args: argparse.Namespace, out: Path, kept: dict[str, Any]) -> None:
    from fastvlm.florenz import parameter_counts
    from fastvlm.florenz.training.batches import world_words
    from fastvlm.florenz.training.emergence import held_out
    from fastvlm.florenz.training.looks import HISTORY, history
    from fastvlm.florenz.training.results import evaluate, save, summary
    from fastvlm.loading.processors import square

    settings = kept["settings"]
    # runs of before there was a choice named it
    words = world_words(settings.get("prompts", "named"))
    size = SIZES[settings["size"]]
    found = evaluate(
        model, square(words.prompts, size.pixels), words, size, held_out(size, args.scenes), out,
        num_beams=args.beams,
    )  # fmt: skip
    results = {
        **kept, "parameters": parameter_counts(model), "history": history(out / HISTORY),
        "emergence": found,
    }  # fmt: skip
    files = save(out, results)
    print(summary(found))
    print("\n".join(str(file) for file in (*files, out / "captions.html")))
