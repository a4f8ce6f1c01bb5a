"""Packed batches with DDP: torchrun --nproc-per-node 2 ddp_loop.py"""

import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastvlm.packing import PackingCollator, ResumableDataLoader, TokenBudgetBatchSampler


def loader(samples: list[dict], rank: int, ranks: int) -> ResumableDataLoader:
    """The batches of one rank: as many as of any other, of about as many tokens."""
    collator = PackingCollator(groups=tiny.TASKS, **tiny.IMAGE_TOKENS, **tiny.SPECIAL_IDS)
    lengths = [collator.lengths(sample) for sample in samples]
    sampler = TokenBudgetBatchSampler(lengths, max_target_tokens=40, num_replicas=ranks, rank=rank)
    return ResumableDataLoader(samples, batch_sampler=sampler, collate_fn=collator)


def train(model: torch.nn.Module, batches: ResumableDataLoader, epochs: int) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            # the ranks' gradients are averaged: each counts by its share of the step's labels
            labels = (batch["labels"] != -100).sum()
            everywhere = labels.clone()
            dist.all_reduce(everywhere)
            loss = model(**batch).loss * (labels / everywhere)
            (loss * dist.get_world_size()).backward()
            optimizer.step()
            optimizer.zero_grad()
            dist.all_reduce(loss.detach())
            losses.append(loss.item())
    return losses


def main(epochs: int = 6) -> list[float]:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(tiny.model())
    batches = loader(tiny.samples(), dist.get_rank(), dist.get_world_size())
    losses = train(model, batches, epochs)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    print(main())
