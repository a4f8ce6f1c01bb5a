"""One run, stage by stage: a language model and a vision tower first, then the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Florence2Config,
    Florence2ForConditionalGeneration,
    PrinterCallback,
    TrainingArguments,
)

import fastvlm
from fastvlm.florenz import (
    FlorenzForConditionalGeneration,
    freeze_as_published,
    from_pretrained_parts,
)
from fastvlm.florenz.data.annotations import GROUPS
from fastvlm.florenz.training.batches import Words, collator_of, world_batches, world_words
from fastvlm.florenz.training.looks import Looks
from fastvlm.florenz.training.saving import newest_checkpoint, save_model
from fastvlm.florenz.training.settings import CHECKPOINTS, Settings, claim
from fastvlm.florenz.training.sizes import SIZES, config_of
from fastvlm.florenz.training.stages import Stages
from fastvlm.florenz.training.trainer import WARM_UP, GroupTrainer, Lines, common_arguments
from fastvlm.loading.processors import square

_LOOKS = 12  # at the losses, in a run


def train(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    report_to: str = "none",
    save_steps: int | None = None,
    say: Callable[[str], None] = print,
) -> Any:
    """Train in a folder and save the model there; returns it, and what was logged on the way.

    UsageError: a folder that holds a run (without resume), or another one (with it), or a damaged
    checkpoint.
    """
    claim(settings, out, resume)
    size, words = SIZES[settings.size], world_words(settings.prompts)
    torch.manual_seed(settings.seed)
    # the placeholder of the image is the last of the prompts' tokens and has no row of its own
    config = config_of(size, settings.decoder, len(words.prompts) - 1, len(words.texts))
    common = common_arguments(
        learning_rate=settings.learning_rate or size.learning_rate, weight_decay=0.01,
        seed=settings.seed, report_to=report_to,
    )  # fmt: skip
    stages = Stages(settings, out, common, resume, say)
    decoder = None
    if settings.decoder == "frozen":
        decoder = stages.language_model(config, words)
    model = _assembled(config, decoder, settings)
    stages.vision_tower(model)
    freeze_as_published(model).train()
    if settings.patched:
        say(str(fastvlm.patch(model)).splitlines()[0])
    trainer = _trainer(settings, model, words, out / CHECKPOINTS, common, save_steps)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Lines("step", say))
    trainer.add_callback(Looks(words, size, out, max(1, settings.steps // _LOOKS)))
    found = newest_checkpoint(out / CHECKPOINTS) if resume else None
    trainer.train(resume_from_checkpoint=found and str(found))
    if trainer.is_world_process_zero():
        save_model(model, square(words.prompts, size.pixels), words.texts, out)
    return model, trainer


def _assembled(config: Any, decoder: Any, settings: Settings) -> Any:
    """The model before training, around the decoder that there is."""
    torch.manual_seed(settings.seed)
    if decoder is None:
        model = FlorenzForConditionalGeneration(config)
    else:
        florence = Florence2ForConditionalGeneration(
            Florence2Config(
                text_config=config.encoder.to_dict(), vision_config=config.vision_config.to_dict(),
                image_token_id=config.image_token_id,
            )
        )  # fmt: skip
        model = from_pretrained_parts(florence, decoder)
    return model.train()


def _trainer(
    settings: Settings, model: Any, words: Words, folder: Path, common: dict[str, Any],
    save_steps: int | None,
) -> Any:  # fmt: skip
    steps, size = settings.steps, SIZES[settings.size]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, warmup_steps=min(WARM_UP * 2, steps // 4),
        gradient_accumulation_steps=settings.accumulate, logging_steps=max(1, steps // 50),
        save_strategy="steps", save_steps=save_steps or max(1, steps // 4), **common,
    )  # fmt: skip
    collator = collator_of(size, model.config, settings.seed)
    # as many batches as any number of processes needs: each takes its share
    batches = steps * settings.accumulate * arguments.world_size
    return GroupTrainer(
        model, arguments, data_collator=collator, group_names=GROUPS, patched=settings.patched,
        train_dataset=world_batches(size, words, collator, batches, settings.seed),
    )  # fmt: skip
