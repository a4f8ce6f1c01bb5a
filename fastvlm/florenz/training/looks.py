"""Losses on scenes never trained on, looked at while a run trains and kept beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastvlm.florenz.training.batches import Words
from fastvlm.florenz.training.emergence import held_out, losses
from fastvlm.florenz.training.sizes import Size

HISTORY = "history.jsonl"
_SCENES = 16


class Looks(TrainerCallback):
    """Appends {"step", "SC", "ST", "UC"} to a file every so many steps, and at the last one.

    A run that resumes drops what it will look at again.
    """

    def __init__(self, words: Words, size: Size, out: Path, every: int) -> None:
        self.words, self.size, self.file, self.every = words, size, out / HISTORY, every
        self.shown = held_out(size, _SCENES)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            kept = [look for look in history(self.file) if look["step"] <= state.global_step]
            self.file.write_text("".join(json.dumps(look) + "\n" for look in kept))

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        last = state.global_step == state.max_steps
        if state.is_world_process_zero and (last or state.global_step % self.every == 0):
            look = {"step": state.global_step, **losses(model, self.words, self.size, self.shown)}
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(look) + "\n")


def history(file: Path) -> list[dict[str, Any]]:
    """The looks of a run so far."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
