"""What comes before training: a language model, and a vision tower that knows such pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Gemma2ForCausalLM, PrinterCallback, Trainer, TrainingArguments

import fastvlm
from fastvlm.florenz.training.batches import Sentences, Words, sentence_batch
from fastvlm.florenz.training.settings import (
    CHECKPOINTS,
    LANGUAGE_MODEL,
    TOWER,
    Settings,
    starts_of,
)
from fastvlm.florenz.training.sizes import MULTILINGUALITY, SIZES
from fastvlm.florenz.training.trainer import WARM_UP, Lines
from fastvlm.florenz.training.vision import FIRST, Namer, Pictures, picture_batch
from fastvlm.usage import UsageError

_WEIGHTS = "model.safetensors"
_LINES = 12


@dataclass(frozen=True)
class Stages:
    """The stages of a run in a folder. common: arguments of every Trainer of the run."""

    settings: Settings
    out: Path
    common: dict[str, Any]
    resume: bool
    say: Callable[[str], None]

    def language_model(self, config: Any, words: Words) -> Any:
        """Gemma2ForCausalLM in the form of the decoder, trained on sentences of its languages, or
        loaded where that is done."""
        found = self._done(LANGUAGE_MODEL)
        if found is not None:
            with self._reading(found):
                return Gemma2ForCausalLM.from_pretrained(found.parent, attn_implementation="eager")
        decoder = config.decoder
        plain = type(decoder)(**{**decoder.to_dict(), "cross_attention_hidden_size": None})
        model = Gemma2ForCausalLM._from_config(plain, attn_implementation="eager")
        if self.settings.patched:
            fastvlm.patch(model)
        steps, size = self.settings.language_steps, SIZES[self.settings.size]
        start, pad = config.decoder_start_token_id, config.pad_token_id
        languages = MULTILINGUALITY[self.settings.languages]
        trainer = Trainer(
            model, self._arguments(LANGUAGE_MODEL, steps),
            train_dataset=Sentences(size, words, languages, steps, self.settings.seed),
            data_collator=lambda rows: sentence_batch(rows, start, pad),
        )  # fmt: skip
        saves = self._run("language model", trainer)
        fastvlm.unpatch(model)
        if saves:
            model.save_pretrained(self.out / LANGUAGE_MODEL)
        return model

    def vision_tower(self, model: Any) -> None:
        """Train tower and projector of a model to name what pictures show, in place, or load them
        where that is done."""
        namer = Namer(model.model, SIZES[self.settings.size].variety).train()
        found = self._done(TOWER)
        if found is not None:
            with self._reading(found):
                namer.load_state_dict(load_file(found))
            return
        size, steps = SIZES[self.settings.size], self.settings.vision_steps
        batch = {"per_device_train_batch_size": size.pictures, "learning_rate": size.vision_rate}
        arguments = self._arguments(TOWER, steps, **batch)
        data = Pictures(size, steps * size.pictures * arguments.world_size, self.settings.seed)
        first = Pictures(size, FIRST, self.settings.seed)
        namer.standardize(picture_batch([first[n] for n in range(FIRST)])["pixel_values"])
        trainer = Trainer(namer, arguments, train_dataset=data, data_collator=picture_batch)
        if self._run("vision tower", trainer):
            (self.out / TOWER).mkdir(exist_ok=True)
            save_file(namer.state_dict(), self.out / TOWER / _WEIGHTS)

    def _done(self, stage: str) -> Path | None:
        """The weights of a stage that is done, which are written last."""
        own = [self.out] if self.resume else []
        folders = chain(own, starts_of(self.settings, stage))
        files = (folder / stage / _WEIGHTS for folder in folders)
        return next((file for file in files if file.is_file()), None)

    @contextmanager
    def _reading(self, file: Path) -> Iterator[None]:
        """UsageError, by the argument that led to it, of a file that is damaged."""
        try:
            yield
        except (RuntimeError, OSError, SafetensorError) as error:
            argument = "--resume" if file.is_relative_to(self.out) else "--start-from"
            why = str(error).strip().splitlines()[0]
            wanted = "a run whose files read; remove this one to train it again"
            raise UsageError(argument, wanted, f"{file} ({why})") from None

    def _arguments(self, stage: str, steps: int, **own: Any) -> TrainingArguments:
        return TrainingArguments(
            str(self.out / stage / CHECKPOINTS), max_steps=steps,
            warmup_steps=min(WARM_UP, steps // 4), logging_steps=max(1, steps // _LINES),
            save_strategy="no", **{**self.common, **own},
        )  # fmt: skip

    def _run(self, what: str, trainer: Trainer) -> bool:
        """Whether this process is the one that saves."""
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Lines(what, self.say))
        trainer.train()
        return trainer.is_world_process_zero()
