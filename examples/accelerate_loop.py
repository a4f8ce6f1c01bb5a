"""Packed batches with Accelerate, which deals the sampler's batches out to its processes."""

import tiny
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from fastvlm.packing import PackingCollator, TokenBudgetBatchSampler


def main(epochs: int = 6) -> list[float]:
    accelerator, samples = Accelerator(cpu=True), tiny.samples()
    collator = PackingCollator(groups=tiny.TASKS, **tiny.IMAGE_TOKENS, **tiny.SPECIAL_IDS)
    lengths, ranks = [collator.lengths(sample) for sample in samples], accelerator.num_processes
    sampler = TokenBudgetBatchSampler(lengths, max_target_tokens=64, num_replicas=ranks, rank=None)
    loader = DataLoader(samples, batch_sampler=sampler, collate_fn=collator)
    model, loader = accelerator.prepare(tiny.model(), loader)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main())
