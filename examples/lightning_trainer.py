"""Packed batches with Lightning, whose checkpoints keep the place in the middle of an epoch."""

from typing import Any

import lightning
import tiny
import torch
from torch import Tensor

from fastvlm.packing import PackingCollator, ResumableDataLoader, TokenBudgetBatchSampler


class Packed(lightning.LightningModule):
    def __init__(self, samples: list[Any]):
        super().__init__()
        self.model, self.samples, self.losses = tiny.model(), samples, []

    def train_dataloader(self) -> ResumableDataLoader:
        collator = PackingCollator(groups=tiny.TASKS, **tiny.IMAGE_TOKENS, **tiny.SPECIAL_IDS)
        sampler = TokenBudgetBatchSampler(
            [collator.lengths(sample) for sample in self.samples],
            max_target_tokens=64,
            num_replicas=self.trainer.world_size,
            rank=self.trainer.global_rank,
        )
        return ResumableDataLoader(self.samples, batch_sampler=sampler, collate_fn=collator)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        self.log("loss", loss, batch_size=len(batch["labels"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def trainer(**arguments: Any) -> lightning.Trainer:
    """Each rank makes its own batches, so Lightning puts no sampler of its own in their place."""
    settings = {"log_every_n_steps": 1, "logger": False, **arguments}
    return lightning.Trainer(accelerator="cpu", use_distributed_sampler=False, **settings)


def main(epochs: int = 6) -> list[float]:
    module = Packed(tiny.samples())
    trainer(max_epochs=epochs, enable_checkpointing=False).fit(module)
    return module.losses


if __name__ == "__main__":
    print(main())
