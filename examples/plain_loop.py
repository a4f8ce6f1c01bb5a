"""Packed batches in a plain loop that can be stopped and taken up anywhere."""

import tiny
import torch

from fastvlm.packing import PackingCollator, ResumableDataLoader, TokenBudgetBatchSampler


def main(epochs: int = 6) -> list[float]:
    samples, model = tiny.samples(), tiny.model()
    collator = PackingCollator(groups=tiny.TASKS, **tiny.IMAGE_TOKENS, **tiny.SPECIAL_IDS)
    lengths = [collator.lengths(sample) for sample in samples]
    sampler = TokenBudgetBatchSampler(lengths, max_target_tokens=64)
    loader = ResumableDataLoader(samples, batch_sampler=sampler, collate_fn=collator)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for epoch in range(sampler.epoch, epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main())
