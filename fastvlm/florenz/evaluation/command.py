"""``fastvlm florenz evaluate``: a checkpoint on one of the sets, or kept answers once more."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvlm.decoding.languages import LANGUAGES
from fastvlm.florenz.data.public import READERS, SPLITS, read_set
from fastvlm.florenz.data.sets import NAMES, EvaluationSet, chosen
from fastvlm.florenz.data.shards import DataError
from fastvlm.florenz.evaluation.metrics import METRICS, Means, metrics_of
from fastvlm.florenz.evaluation.records import Answer, read_answers, write_answers
from fastvlm.florenz.evaluation.report import ANSWERS, RESULTS, measured, save, table
from fastvlm.florenz.evaluation.tokens import TOKENIZERS, Missing
from fastvlm.florenz.training.settings import world_size_of
from fastvlm.florenz.training.sizes import SIZES
from fastvlm.usage import MOST_TOKENS, UsageError, whole_number

_WORDS = {"world": "words", "xm3600": "stanza"}  # else as COCO's evaluation
_SCENES = 100
CAPTION_TASK = "<CAPTION>"
_PROGRESS = 20  # lines about how far it is


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``florenz evaluate``."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a Florenz checkpoint: id or folder"
    )
    parser.add_argument("--set", choices=NAMES, help="world and world-translation need no --data")
    parser.add_argument("--data", metavar="PATH", help="the set's texts, as published")
    parser.add_argument(
        "--images", metavar="FOLDER", help="its pictures; default: beside the texts"
    )
    parser.add_argument(
        "--split", help="one, or several with commas; default: those the paper reports"
    )
    parser.add_argument(
        "--languages", metavar="CODES", help="with commas between them; default: all of the set"
    )
    parser.add_argument(
        "--limit", type=whole_number("--limit", 1), metavar="N",
        help=f"only the first items; of the small world so many scenes, default {_SCENES}",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", help=f"for {RESULTS} and {ANSWERS}")
    parser.add_argument(
        "--answers", metavar="FOLDER",
        help="of an earlier --out: measure its answers again, without a model",
    )  # fmt: skip
    _writing(parser)
    _measuring(parser)


def _writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--beams", type=whole_number("--beams", 1, 64), default=4, help="default 4")
    parser.add_argument(
        "--new-tokens", type=whole_number("--new-tokens", 1, MOST_TOKENS), default=128,
        metavar="N", help="at most; default 128",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=whole_number("--batch", 1), default=4, metavar="N",
        help="pictures that are captioned together; default 4",
    )  # fmt: skip
    parser.add_argument(
        "--no-prefix", action="store_true",
        help="captions do not begin with the first words of their language",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", default=CAPTION_TASK, metavar="TEXT",
        help="of captions: a task, or text in which {language} is the language's name; "
        f"default {CAPTION_TASK}",
    )  # fmt: skip
    parser.add_argument(
        "--world-size", choices=tuple(SIZES),
        help="whose scenes; default: that of the run, or base",
    )  # fmt: skip
    parser.add_argument("--tokenizer", metavar="ID_OR_FOLDER", help="as for fastvlm caption")
    parser.add_argument("--processor", metavar="ID_OR_FOLDER", help="as for fastvlm caption")
    parser.add_argument(
        "--image-size", type=whole_number("--image-size", 32), metavar="PIXELS",
        help="default: as the processor says (published: 768 after fine-tuning, 224 before)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="default float32",
    )  # fmt: skip
    parser.add_argument("--unpatched", action="store_true", help="transformers alone")


def _measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metrics", metavar="NAMES",
        help=f"of {', '.join(METRICS)}, with commas between them; default: those of the task that "
        "need no model. One that is asked for by name must be possible here",
    )  # fmt: skip
    parser.add_argument(
        "--cider-words", choices=TOKENIZERS,
        help="ptb (needs java): as COCO's evaluation, the default; stanza: the default of xm3600; "
        "words: a rule of our own that needs nothing, the default of world",
    )  # fmt: skip
    parser.add_argument(
        "--meteor", metavar="FOLDER",
        help="of METEOR 1.5 with data/; default: pycocoevalcap's, which has English alone",
    )  # fmt: skip
    parser.add_argument("--clip", default=Means.clip, help=f"of CLIPScore; default {Means.clip}")
    parser.add_argument("--comet", default=Means.comet, help=f"default {Means.comet}")


def run(args: argparse.Namespace) -> int:
    """0: measured. UsageError: a model, a set, a file or a metric that cannot be used."""
    if (args.model is None) == (args.answers is None):
        given = "neither" if args.model is None else "both"
        raise UsageError("MODEL", "a checkpoint, or --answers", given)
    if args.answers is not None:
        for name in ("set", "data", "images", "split", "languages", "limit"):
            if getattr(args, name) is not None:
                raise UsageError(f"--{name}", "no --answers beside it", getattr(args, name))
        results, found = _kept(Path(args.answers))
        metrics, out = _metrics(args, results["set"], results["task"]), _out(args)
    else:
        asked = _set(args)
        metrics, out = _metrics(args, asked.name, asked.task), _out(args)
        results, found = _answered(args, asked)
    figures, missing = measured(found, metrics, results["set"], _means(args, results["set"]))
    results["figures"] = {**results["figures"], **figures}
    kept = {name: why for name, why in results["missing"].items() if name not in figures}
    results["missing"] = {**kept, **missing}
    if {"CIDEr", "B@4"} & set(figures):
        results["cider_words"] = _words(args, results["set"])
    print(table(results))
    if out is not None:
        write_answers(out / ANSWERS, found)
        print(f"{save(out, results)}\n{out / ANSWERS}")
    return 0


def _set(args: argparse.Namespace) -> EvaluationSet:
    if args.set is None:
        raise UsageError("--set", f"one of {', '.join(NAMES)}", "none")
    languages = None if args.languages is None else _languages(args.languages)
    try:
        if args.set not in READERS:
            for name in ("data", "images", "split"):
                if getattr(args, name) is not None:
                    raise UsageError(f"--{name}", f"no --set {args.set}", getattr(args, name))
            return chosen(_world(args), languages, None)
        if args.data is None:
            raise UsageError("--data", f"the files of {args.set}", "none")
        images = None if args.images is None else Path(args.images)
        split = args.split or SPLITS.get(args.set, "")
        found = read_set(args.set, Path(args.data), images, split, languages)
        return chosen(found, languages, args.limit)
    except DataError as error:
        raise UsageError("--data", f"{args.set} as it is published", error) from None


def _languages(text: str) -> list[str]:
    codes = list(dict.fromkeys(code.strip() for code in text.split(",") if code.strip()))
    if not codes or not set(codes) <= set(LANGUAGES):
        raise UsageError("--languages", f"some of {','.join(LANGUAGES)}", repr(text))
    return codes


def _world(args: argparse.Namespace) -> EvaluationSet:
    from fastvlm.florenz.evaluation.world import world_captions, world_translations

    name = args.world_size or world_size_of(Path(args.model)) or "base"
    made = world_captions if args.set == "world" else world_translations
    return made(SIZES[name], args.limit or _SCENES)


def _metrics(args: argparse.Namespace, set_name: str, task: str) -> list[str]:
    if args.metrics is None:
        return metrics_of(task, set_name)
    names = list(dict.fromkeys(name.strip() for name in args.metrics.lower().split(",")))
    known = [name for name, metric in METRICS.items() if task in metric.tasks]
    if not set(names) <= set(known):
        raise UsageError("--metrics", f"some of {', '.join(known)} of a {task}", repr(args.metrics))
    for name in names:
        try:
            METRICS[name].needs(_means(args, set_name))
        except Missing as why:
            raise UsageError("--metrics", "what can be measured here", f"{name}: {why}") from None
    return names


def _words(args: argparse.Namespace, set_name: str) -> str:
    return str(args.cider_words or _WORDS.get(set_name, TOKENIZERS[0]))


def _means(args: argparse.Namespace, set_name: str) -> Means:
    return Means(_words(args, set_name), args.meteor, args.clip, args.comet, args.device)


def _out(args: argparse.Namespace) -> Path | None:
    """UsageError: a folder that cannot be written, or holds another evaluation."""
    if args.out is None:
        return None
    folder = Path(args.out)
    if args.out != args.answers and (folder / RESULTS).exists():
        raise UsageError("--out", "a folder without an evaluation", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("--out", "a folder that can be written", error) from None
    return folder


def _kept(folder: Path) -> tuple[dict[str, Any], list[Answer]]:
    wanted = "a folder of an earlier --out"
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        found = read_answers(folder / ANSWERS)
        if not {"set", "task", "model", "figures", "missing"} <= set(results):
            raise DataError(f"{folder / RESULTS} is of no evaluation")
    except (OSError, ValueError, TypeError) as error:
        raise UsageError("--answers", wanted, error) from None
    return results, found


def _answered(
    args: argparse.Namespace, asked: EvaluationSet
) -> tuple[dict[str, Any], list[Answer]]:
    """What a model writes about a set, and what is to be said of it."""
    import torch

    from fastvlm import patch
    from fastvlm.captioning.models import pretrained
    from fastvlm.florenz.evaluation.answers import Writing, answers

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device", "a device that is there", "cuda (PyTorch sees no GPU)")
    loaded = pretrained(
        args.model, args.tokenizer, args.device, getattr(torch, args.dtype), args.processor,
        args.image_size,
    )  # fmt: skip
    if loaded.model.config.model_type != "florenz":
        raise UsageError("MODEL", "a Florenz checkpoint", loaded.id)
    if not args.unpatched:
        patch(loaded.model)
    how = Writing(args.beams, args.new_tokens, not args.no_prefix, args.prompt, args.batch)
    since, found = time.perf_counter(), list[Answer]()
    every = max(1, len(asked.items) // _PROGRESS)
    try:
        for one in answers(loaded, asked, how):
            if found and one.item != found[-1].item and one.item % every == 0:
                print(f"{one.item} of {len(asked.items)} items", flush=True)
            found.append(one)
    except ValueError as error:
        raise UsageError("florenz evaluate", "a model and pictures that fit", error) from None
    results = {
        "model": loaded.name, "id": loaded.id, "commit": loaded.revision, "set": asked.name,
        "task": asked.task, "split": args.split or SPLITS.get(asked.name),
        "languages": asked.languages,
        "items": len(asked.items), "beams": args.beams, "new_tokens": args.new_tokens,
        "prefix": not args.no_prefix, "prompt": args.prompt, "dtype": args.dtype,
        "patched": not args.unpatched, "seconds": round(time.perf_counter() - since, 1),
        "figures": _shares(asked, found), "missing": {},
    }  # fmt: skip
    return results, found


def _shares(asked: EvaluationSet, found: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Of the small world, whose captions are read back by its grammar."""
    figures: dict[str, dict[str, float]] = {}
    if asked.scenes:
        from fastvlm.florenz.evaluation.world import shares

        for code in asked.languages:
            some = [one for one in found if one.language == code]
            for name, value in shares(asked, some, code).items():
                figures.setdefault(name, {})[code] = round(value, 3)
    return figures
