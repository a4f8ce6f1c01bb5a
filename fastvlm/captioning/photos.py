"""``python -m fastvlm caption --image``: a few photos, their captions printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict

import fastvlm
from fastvlm.captioning import arguments
from fastvlm.captioning.models import RANDOM, Loaded
from fastvlm.captioning.tasks import CAPTIONS, split
from fastvlm.loading.random_florence2 import load_photo
from fastvlm.tables import text_table
from fastvlm.usage import UsageError


def prompt_of(args: argparse.Namespace) -> str:
    """The one thing that is asked. UsageError: several, or one whose answer is no text."""
    tasks = args.tasks or ["<CAPTION>"]
    if len(tasks) > 1:
        raise UsageError("--task", "one, or --out beside several", ", ".join(tasks))
    try:
        task, rest = split(tasks[0])
    except ValueError as error:
        raise UsageError("--task", *str(error).split("; got ", 1)) from None
    if task is None:
        return rest
    if task.token not in CAPTIONS:
        raise UsageError("--task", f"--out beside {task.token}", "none")
    return task.token


def run(args: argparse.Namespace, languages: list[str], load: Callable[[], Loaded]) -> int:
    """With parsed arguments (`fastvlm.captioning.arguments`); returns the exit code."""
    prompt = prompt_of(args)
    photos, names = zip(*(load_photo(path) for path in args.image or [None]))
    told = arguments.patched(args, load())
    captions = fastvlm.caption(
        told.model,
        told.processor,
        list(photos),
        languages,
        tokenizer=told.tokenizer,
        prompt=prompt,
        num_beams=args.beams,
        max_new_tokens=args.new_tokens or arguments.NEW_TOKENS,
        keep_prefix=args.keep_prefix,
        features=arguments.features(args, told),
    )
    if not told.real:
        print(RANDOM, file=sys.stderr)
    if args.json:
        figures = {
            "model": told.name,
            "weights": "real" if told.real else "random",
            "captions": [{**asdict(c), "image": names[c.image]} for c in captions],
        }
        print(json.dumps(figures, indent=1, ensure_ascii=False))
        return 0
    rows = [(names[c.image], c.language, f"{c.score:.3f}", c.text) for c in captions]
    print(f"{told.name}, {'real' if told.real else 'random'} weights, {args.beams} beams\n")
    print(text_table(("image", "language", "score", "text"), rows))
    return 0
