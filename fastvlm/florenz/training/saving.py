"""What a run leaves: checkpoints to resume from, and a model that `fastvlm caption` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastvlm.loading.processors import DECODER_FOLDER
from fastvlm.usage import UsageError

_PARTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from, read through; None where there is none yet.

    UsageError: one that is damaged. It is named, and nothing older is taken silently.
    """
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        return None
    for name in _PARTS:
        try:
            _read(Path(found) / name)
        except Exception as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            wanted = "a checkpoint that reads; remove this one to go on from the one before"
            raise UsageError("--resume", wanted, f"{Path(found) / name} ({why[0]})") from None
    return Path(found)


def _read(file: Path) -> None:
    if file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))
    elif file.suffix == ".safetensors":
        from safetensors.torch import load_file

        load_file(file)
    else:
        torch.load(file, map_location="cpu", weights_only=True)


def save_model(model: Any, processor: Any, texts: Any, out: Path) -> None:
    """Model, processor and the tokenizer of its texts, as `fastvlm caption --model` loads them."""
    model.save_pretrained(out)
    processor.save_pretrained(out)
    texts.save_pretrained(out / DECODER_FOLDER)
