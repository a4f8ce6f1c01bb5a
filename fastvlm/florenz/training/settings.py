"""What a run is, and the folder that holds it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastvlm.florenz.training.sizes import SIZES
from fastvlm.usage import UsageError

SETTINGS, CHECKPOINTS = "settings.json", "checkpoints"
LANGUAGE_MODEL, TOWER = "language_model", "vision_tower"  # stages before training
PROMPTS = ("named", "bare")


@dataclass(frozen=True)
class Settings:
    """What a run is.

    steps, language_steps, vision_steps: of training, and of the language model and the vision
    tower before it. languages: how many the language model reads (a key of `MULTILINGUALITY`); of
    no meaning to a decoder trained from scratch. accumulate: micro-batches of a step. start: the
    folder of a run whose vision tower is taken instead of trained, and its language model where
    that has read the same languages. prompts: one
    of `PROMPTS`: whether the prompts of captions name the language, as published.
    """

    size: str
    decoder: str
    languages: int
    seed: int
    steps: int
    language_steps: int
    vision_steps: int
    patched: bool
    accumulate: int = 1
    learning_rate: float | None = None
    start: str | None = None
    prompts: str = "named"


@dataclass(frozen=True)
class FineTuning:
    """What a run of fine-tuning is.

    model: the checkpoint that it begins with. data: where the samples come from, in words. images:
    in a batch of one process, with so many targets each. size: of the small world, where the model
    is of it; so it is found again in what fine-tuning leaves.
    """

    model: str
    data: dict[str, Any]
    steps: int
    images: int
    targets: int
    accumulate: int
    learning_rate: float
    weight_decay: float
    warm_up: int
    image_size: int | None
    seed: int
    patched: bool
    size: str | None = None


def claim(settings: Settings | FineTuning, out: Path, resume: bool) -> None:
    """Make the folder of a run, or look whether it is the one to go on with.

    UsageError: a folder that holds something, or another run; a start that does not fit.
    """
    file = out / SETTINGS
    if resume:
        before = _read(file, "--resume", f"a folder with a run ({SETTINGS})")
        # what a run of before had no choice in
        before = {**{f.name: f.default for f in fields(settings) if f.name not in before}, **before}
        if before != asdict(settings):
            changed = sorted(k for k, v in asdict(settings).items() if before.get(k) != v)
            raise UsageError("--resume", f"the settings of the run in {out}", ", ".join(changed))
        return
    if isinstance(settings, Settings) and settings.start is not None:
        _check_start(settings, Path(settings.start))
    if int(os.environ.get("RANK", "0")):
        return  # torchrun's first process made the folder, or refuses it
    if out.exists() and any(out.iterdir()):
        raise UsageError("--out", "a folder that is new or empty, or --resume", out)
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")


def _check_start(settings: Settings, folder: Path) -> None:
    other = _read(folder / SETTINGS, "--start-from", "the folder of a run")
    if other.get("size") != settings.size:
        raise UsageError("--start-from", f"a run with size {settings.size}", other.get("size"))


def starts_of(settings: Settings, stage: str) -> Iterator[Path]:
    """The folder that a run starts from, the one that this started from, and so on: those whose
    stage, language model or vision tower, is the one that the run would train.

    UsageError: a folder that is no run's.
    """
    start = settings.start
    while start is not None:
        folder = Path(start)
        other = _read(folder / SETTINGS, "--start-from", "the folder of a run")
        same = ("size", "decoder", "languages") if stage == LANGUAGE_MODEL else ("size",)
        if all(other.get(name) == getattr(settings, name) for name in same):
            yield folder
        start = other.get("start")


def _read(file: Path, argument: str, wanted: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(argument, wanted, file.parent) from None
    if not isinstance(found, dict):
        raise UsageError(argument, wanted, file.parent)
    return found


def world_size_of(folder: Path) -> str | None:
    """The size of the run that left a checkpoint; None: it is of no run."""
    try:
        size = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if size in SIZES else None
