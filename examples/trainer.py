"""Packed batches with transformers' Trainer: its loader replaced, nothing else."""

from typing import Any

import tiny
from transformers import Trainer, TrainingArguments

from fastvlm.packing import PackingCollator, ResumableDataLoader, TokenBudgetBatchSampler


class PackedTrainer(Trainer):
    """Each rank makes its own batches, so the loader is not given to Accelerate to be split."""

    def get_train_dataloader(self) -> ResumableDataLoader:
        sampler = TokenBudgetBatchSampler(
            [self.data_collator.lengths(sample) for sample in self.train_dataset],
            max_target_tokens=64,
            num_replicas=self.args.world_size,
            rank=self.args.process_index,
            seed=self.args.seed,
        )
        return ResumableDataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )


def trainer(output_dir: str, samples: list[Any], **arguments: Any) -> PackedTrainer:
    collator = PackingCollator(groups=tiny.TASKS, **tiny.IMAGE_TOKENS, **tiny.SPECIAL_IDS)
    settings = TrainingArguments(
        output_dir, **{"num_train_epochs": 6, "learning_rate": 0.01, "report_to": [], **arguments}
    )
    return PackedTrainer(tiny.model(), settings, collator, samples)


def main(output_dir: str = "packed-trainer") -> list[float]:
    run = trainer(output_dir, tiny.samples(), use_cpu=True, logging_steps=1, save_strategy="no")
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
