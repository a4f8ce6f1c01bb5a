"""One run, stage by stage: a language model first, where the decoder is frozen, then the model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Florence2Config,
    Florence2ForConditionalGeneration,
    Gemma2ForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

import fastvlm
from fastvlm.demo.arguments import UsageError
from fastvlm.florenz import (
    FlorenzForConditionalGeneration,
    freeze_as_published,
    from_pretrained_parts,
)
from fastvlm.florenz.data.annotations import GROUPS
from fastvlm.florenz.training.batches import (
    Sentences,
    Words,
    WorldBatches,
    collator_of,
    sentence_batch,
)
from fastvlm.florenz.training.looks import Looks
from fastvlm.florenz.training.saving import newest_checkpoint, save_model
from fastvlm.florenz.training.sizes import MULTILINGUALITY, SIZES, config_of
from fastvlm.florenz.training.tokenizers import prompt_tokenizer, text_tokenizer
from fastvlm.florenz.training.trainer import GroupTrainer, Lines

SETTINGS, LANGUAGE_MODEL, CHECKPOINTS = "settings.json", "language_model", "checkpoints"
# of the steps, those in which the learning rate rises, and those between two looks at the losses
_WARM_UP, _LOOKS = 20, 12


@dataclass(frozen=True)
class Settings:
    """What a run is. steps, language_steps: of training and of the language model before it.
    languages: how many the language model reads (a key of `MULTILINGUALITY`); of no meaning to a
    decoder trained from scratch. accumulate: micro-batches of a step."""

    size: str
    decoder: str
    languages: int
    seed: int
    steps: int
    language_steps: int
    patched: bool
    accumulate: int = 1
    learning_rate: float | None = None


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
    _claim(settings, out, resume)
    size, words = SIZES[settings.size], Words(prompt_tokenizer(), text_tokenizer())
    torch.manual_seed(settings.seed)
    # the placeholder of the image is the last of the prompts' tokens and has no row of its own
    config = config_of(size, settings.decoder, len(words.prompts) - 1, len(words.texts))
    common = {
        "per_device_train_batch_size": 1,  # an item is a batch
        "learning_rate": settings.learning_rate or size.learning_rate,
        "lr_scheduler_type": "cosine", "weight_decay": 0.01, "max_grad_norm": 1.0,
        "seed": settings.seed, "report_to": report_to, "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False, "dataloader_pin_memory": torch.cuda.is_available(),
        "save_total_limit": 2, "disable_tqdm": True, "label_names": ["labels"],
        "ddp_find_unused_parameters": False,
    }  # fmt: skip
    decoder = None
    if settings.decoder == "frozen":
        decoder = _language_model(
            settings, config, words, out / LANGUAGE_MODEL, common, resume, say
        )
    model = _assembled(config, decoder, settings)
    if settings.patched:
        say(str(fastvlm.patch(model)).splitlines()[0])
    trainer = _trainer(settings, model, words, out / CHECKPOINTS, common, save_steps)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Lines("step", say))
    trainer.add_callback(Looks(words, size, out, max(1, settings.steps // _LOOKS)))
    found = newest_checkpoint(out / CHECKPOINTS) if resume else None
    trainer.train(resume_from_checkpoint=found and str(found))
    if trainer.is_world_process_zero():
        save_model(model, words, size, out)
    return model, trainer


def _claim(settings: Settings, out: Path, resume: bool) -> None:
    file = out / SETTINGS
    if resume:
        if not file.is_file():
            raise UsageError("--resume", f"a folder with a run ({SETTINGS})", out)
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != asdict(settings):
            changed = sorted(k for k, v in asdict(settings).items() if before.get(k) != v)
            raise UsageError("--resume", f"the settings of the run in {out}", ", ".join(changed))
        return
    if int(os.environ.get("RANK", "0")):
        return  # torchrun's first process made the folder, or refuses it
    if out.exists() and any(out.iterdir()):
        raise UsageError("--out", "a folder that is new or empty, or --resume", out)
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")


def _language_model(
    settings: Settings, config: Any, words: Words, folder: Path, common: dict[str, Any],
    resume: bool, say: Callable[[str], None],
) -> Any:  # fmt: skip
    """Gemma2ForCausalLM in the form of the decoder, trained on sentences of its languages."""
    if resume and (folder / "config.json").is_file():
        return Gemma2ForCausalLM.from_pretrained(folder, attn_implementation="eager")
    decoder = config.decoder
    plain = type(decoder)(**{**decoder.to_dict(), "cross_attention_hidden_size": None})
    model = Gemma2ForCausalLM._from_config(plain, attn_implementation="eager")
    if settings.patched:
        fastvlm.patch(model)
    steps = settings.language_steps
    arguments = TrainingArguments(
        str(folder / CHECKPOINTS), max_steps=steps, warmup_steps=min(_WARM_UP, steps // 4),
        logging_steps=max(1, steps // _LOOKS), save_strategy="no", **common,
    )  # fmt: skip
    languages = MULTILINGUALITY[settings.languages]
    size, start = SIZES[settings.size], config.decoder_start_token_id
    data = Sentences(size, words, languages, steps, settings.seed)
    trainer = Trainer(
        model, arguments, train_dataset=data,
        data_collator=lambda rows: sentence_batch(rows, start, config.pad_token_id),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Lines("language model", say))
    trainer.train()
    fastvlm.unpatch(model)
    if trainer.is_world_process_zero():
        model.save_pretrained(folder)
    return model


def _assembled(config: Any, decoder: Any, settings: Settings) -> Any:
    """The model before training, with requires_grad as published, but for the vision tower: the
    paper's is Florence-2's; there is none for the world, so it is trained with the rest."""
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
    freeze_as_published(model)
    model.model.vision_tower.requires_grad_(True)
    model.model.multi_modal_projector.requires_grad_(True)
    return model.train()


def _trainer(
    settings: Settings, model: Any, words: Words, folder: Path, common: dict[str, Any],
    save_steps: int | None,
) -> Any:  # fmt: skip
    steps, size = settings.steps, SIZES[settings.size]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, warmup_steps=min(_WARM_UP * 2, steps // 4),
        gradient_accumulation_steps=settings.accumulate, logging_steps=max(1, steps // 50),
        save_strategy="steps", save_steps=save_steps or max(1, steps // 4), **common,
    )  # fmt: skip
    collator = collator_of(size, model.config, settings.seed)
    # as many batches as any number of processes needs: each takes its share
    batches = steps * settings.accumulate * arguments.world_size
    return GroupTrainer(
        model, arguments, data_collator=collator, group_names=GROUPS, patched=settings.patched,
        train_dataset=WorldBatches(size, words, collator, batches, settings.seed),
    )  # fmt: skip
