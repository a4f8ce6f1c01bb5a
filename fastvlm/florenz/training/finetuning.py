"""Fine-tuning of a checkpoint, with the recipe of arXiv 2503.09443 (paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

import fastvlm
from fastvlm.florenz import freeze_as_published
from fastvlm.florenz.losses import image_tokens_of
from fastvlm.florenz.training.batches import Batches, Words
from fastvlm.florenz.training.saving import newest_checkpoint, save_model
from fastvlm.florenz.training.settings import CHECKPOINTS, FineTuning, claim
from fastvlm.florenz.training.sources import Shuffled, Source
from fastvlm.florenz.training.trainer import GroupTrainer, Lines, common_arguments
from fastvlm.packing import PackingCollator, TargetBalancer

MOST_PROMPT, MOST_TARGET = 128, 128  # tokens, as published


def finetune(
    settings: FineTuning,
    loaded: Any,
    source: Source,
    out: Path,
    *,
    resume: bool = False,
    report_to: str = "none",
    save_steps: int | None = None,
    say: Callable[[str], None] = print,
) -> Any:
    """Fine-tune in a folder and save the model there; returns it, and its trainer.

    loaded: what `fastvlm.captioning.models.pretrained` gives, in float32, where the checkpoint that
    settings name was loaded. Frozen as published. On a GPU in fp16 with master weights in float32,
    on a CPU in float32.
    UsageError: a folder that holds a run (without resume) or another one (with it), or a damaged
    checkpoint.
    """
    claim(settings, out, resume)
    torch.manual_seed(settings.seed)
    model = freeze_as_published(loaded.model).train()
    if settings.patched:
        say(str(fastvlm.patch(model)).splitlines()[0])
    arguments = TrainingArguments(
        str(out / CHECKPOINTS), max_steps=settings.steps,
        warmup_steps=min(settings.warm_up, settings.steps // 4),
        gradient_accumulation_steps=settings.accumulate,
        logging_steps=max(1, settings.steps // 50), save_strategy="steps",
        save_steps=save_steps or max(1, settings.steps // 4), fp16=torch.cuda.is_available(),
        **common_arguments(
            learning_rate=settings.learning_rate, weight_decay=settings.weight_decay,
            seed=settings.seed, report_to=report_to,
        ),
    )  # fmt: skip
    collator = _collator(settings, loaded, source)
    batches = Batches(
        Shuffled(source, settings.seed), Words(loaded.processor.tokenizer, loaded.tokenizer),
        collator, images=settings.images,
        batches=settings.steps * settings.accumulate * arguments.world_size,
    )  # fmt: skip
    trainer = GroupTrainer(
        model, arguments, data_collator=collator, group_names=source.groups,
        patched=settings.patched, train_dataset=batches,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Lines("step", say))
    found = newest_checkpoint(out / CHECKPOINTS) if resume else None
    trainer.train(resume_from_checkpoint=found and str(found))
    if trainer.is_world_process_zero():
        save_model(model, loaded.processor, loaded.tokenizer, out)
    return model, trainer


def _collator(settings: FineTuning, loaded: Any, source: Source) -> PackingCollator:
    """Each image once, beside targets of it that are drawn so that all groups have equal shares."""
    config, pictures = loaded.model.config, loaded.processor.image_processor
    side = pictures.size
    return PackingCollator(
        groups=source.groups, image_processor=pictures,
        pad_token_id=config.encoder.pad_token_id, decoder_pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        prompt_end_token_id=loaded.processor.tokenizer.eos_token_id,
        target_end_token_id=loaded.tokenizer.eos_token_id,
        image_token_id=config.image_token_id,
        num_image_tokens=image_tokens_of(loaded.model, side["height"], side["width"]),
        max_prompt_tokens=MOST_PROMPT, max_target_tokens=MOST_TARGET,
        max_targets_per_image=settings.targets,
        balance=TargetBalancer(source.groups, seed=settings.seed),
    )  # fmt: skip
