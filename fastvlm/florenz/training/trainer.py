"""transformers' Trainer with losses by (task, language), tokens a second and padding left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PrinterCallback, Trainer

from fastvlm.florenz.losses import group_sums

# what a batch of fastvlm.packing holds beside the arguments of a model that is not patched
_OURS = ("groups", "num_groups")
WARM_UP = 20  # steps in which the learning rate rises, in a stage


def common_arguments(
    *, learning_rate: float, weight_decay: float, seed: int, report_to: str
) -> dict[str, Any]:
    """TrainingArguments of every stage: a cosine, gradients clipped at 1, an item is a batch."""
    gpu = torch.cuda.is_available()
    return {
        "per_device_train_batch_size": 1, "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine", "weight_decay": weight_decay, "max_grad_norm": 1.0,
        "seed": seed, "report_to": report_to, "use_cpu": not gpu,
        "remove_unused_columns": False, "dataloader_pin_memory": gpu, "save_total_limit": 2,
        "disable_tqdm": True, "label_names": ["labels"], "ddp_find_unused_parameters": False,
    }  # fmt: skip


class GroupTrainer(Trainer):
    """Trainer whose log has loss/TASK-LANGUAGE, tokens_per_second and padding_saved.

    group_names: those of the collator. patched: whether the model is. Batches come as they leave
    `PackingCollator`, patched or not. tokens: of prompts and targets, padding not counted.
    padding_saved: the share that is padding where every target is a row with a prompt of its own.
    """

    def __init__(
        self, *args: Any, group_names: Sequence[tuple[Any, Any]], patched: bool, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        # as published: a step is the mean over its micro-batches' means
        self.model_accepts_loss_kwargs = False
        self.group_names, self.patched = group_names, patched
        self._sums = torch.zeros(2, len(group_names), dtype=torch.float64)
        self._tokens = self._rows = 0
        self._since = time.perf_counter()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        """The model's loss, its summed parts kept by group. Logits are looked at only of a model
        that does not sum them itself."""
        self._count(inputs)
        if self.patched:
            output = model(**inputs)
            sums, tokens = output.group_losses, output.group_tokens
        else:
            output = model(**{k: v for k, v in inputs.items() if k not in _OURS})
            sums, tokens = group_sums(output.logits.detach(), inputs)
        if model.training:
            self._sums += torch.stack([sums.double(), tokens.double()]).cpu()
        return (output.loss, output) if return_outputs else output.loss

    def _count(self, inputs: dict[str, Any]) -> None:
        prompts, labels = inputs["attention_mask"], inputs["labels"]
        readers = labels.shape[0]
        self._tokens += int(prompts.sum()) + int((labels != -100).sum())
        self._rows += readers * (prompts.shape[1] + labels.shape[1])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._rows:
            own = torch.tensor([float(self._tokens), float(self._rows)], dtype=torch.float64)
            counted = torch.cat([self._sums.flatten(), own]).to(self.args.device)
            # of all processes
            *sums, total, rows = self.accelerator.reduce(counted, "sum").tolist()
            count = len(self.group_names)
            for name, loss, tokens in zip(self.group_names, sums[:count], sums[count:]):
                if tokens:
                    logs[f"loss/{name[0]}-{name[1]}"] = round(loss / tokens, 6)
            now = time.perf_counter()
            logs["tokens_per_second"] = round(total / (now - self._since), 1)
            logs["padding_saved"] = round(1 - total / rows, 4)
            self._sums.zero_()
            self._tokens, self._rows, self._since = 0, 0, now
        super().log(logs, *args, **kwargs)


class Lines(PrinterCallback):
    """A line of text for each look at the losses, instead of a mapping."""

    def __init__(self, what: str, say: Callable[[str], None]) -> None:
        self.what, self.say = what, say

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        parts = [f"{self.what} {state.global_step}/{state.max_steps}", f"loss {logs['loss']:.3f}"]
        parts += [
            f"{name.removeprefix('loss/')} {value:.3f}"
            for name, value in logs.items()
            if name.startswith("loss/")
        ]
        if "tokens_per_second" in logs:
            parts.append(f"{logs['tokens_per_second']:.0f} tokens/s")
        self.say("  ".join(parts))
