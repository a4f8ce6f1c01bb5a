"""Two processes on gloo: DDP and FSDP2 of a patched model give what one unpatched process gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import FAMILIES
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fastvlm

WORLD, STEPS = 2, 3


def halves(batch: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Rows 0 and 1 for one process, row 2 for the other: their token counts differ."""
    return {name: value[:2] if rank == 0 else value[2:] for name, value in batch.items()}


def train(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[float]:
    """A few steps on the mean of the batches' losses, as data-parallel processes take them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        found = [model(**batch).loss for batch in batches]
        torch.stack(found).mean().backward()
        optimizer.step()
        losses.append(torch.stack(found).mean().item())
    return losses


def data_parallel(model: nn.Module, **settings: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, **settings)


def sharded(model: nn.Module, own_head: bool = False, **settings: Any) -> nn.Module:
    """Layer by layer, as trainers do; the root keeps embedding and head."""
    stacks = [model.get_decoder()]
    stacks += [model.get_encoder()] if model.config.is_encoder_decoder else []
    for stack in stacks:
        for layer in stack.layers:
            fully_shard(layer, **settings)
    if own_head:
        fully_shard(model.lm_head, **settings)
    return fully_shard(model, **settings)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": data_parallel,
    "ddp-unused": lambda m: data_parallel(m, find_unused_parameters=True),
    "ddp-static": lambda m: data_parallel(m, static_graph=True),
    "fsdp2": sharded,
    "fsdp2-checkpointing": sharded,
    "fsdp2-bf16": lambda m: sharded(m, mp_policy=MixedPrecisionPolicy(torch.bfloat16)),
}


CASES = [(name, wrapper) for name in ("bart", "gemma2") for wrapper in WRAPPERS]


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    for name, wrapper in CASES:
        model = FAMILIES[name].build().train()
        batch = FAMILIES[name].training(model)
        fastvlm.patch(model)
        if "checkpointing" in wrapper:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = torch.tensor(train(WRAPPERS[wrapper](model), [halves(batch, rank)]))
        dist.all_reduce(losses)
        weights = {n: whole(p) for n, p in model.named_parameters()}
        if rank == 0:
            torch.save((losses / WORLD, weights), f"{folder}/{name}-{wrapper}.pt")
    dist.destroy_process_group()


def whole(parameter: Any) -> Tensor:
    """The parameter itself, gathered where it is sharded."""
    gather = getattr(parameter, "full_tensor", None)
    return (parameter if gather is None else gather()).detach()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one pair of processes: starting them takes longer than the cases."""
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(_process, (str(folder),), nprocs=WORLD)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wrapper"), CASES)
def test_two_processes(name: str, wrapper: str, results: Path) -> None:
    model = FAMILIES[name].build().train()
    batch = FAMILIES[name].training(model)
    first = nn.utils.parameters_to_vector(model.parameters()).clone()
    expected = torch.tensor(train(model, [halves(batch, rank) for rank in range(WORLD)]))
    last = nn.utils.parameters_to_vector(model.parameters())
    assert (last - first).abs().max() > 1e-3  # the steps moved something
    losses, weights = torch.load(results / f"{name}-{wrapper}.pt")
    loose = "bf16" in wrapper
    assert torch.allclose(losses, expected, atol=5e-2 if loose else 1e-4)
    for n, p in model.named_parameters():
        assert torch.allclose(weights[n], p, atol=5e-2 if loose else 1e-4), n


def test_a_sharded_head_of_its_own_gives_logits() -> None:
    """Its weight is gone when the loss is computed, so that is transformers' then."""
    model = models.bart(tie_word_embeddings=False).train()
    fastvlm.patch(model)
    store = dist.HashStore()
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        batch = FAMILIES["bart"].training(model)
        expected = model(**batch).loss
        sharded(model, own_head=True)
        out = model(**batch)
        assert type(out.__dict__["logits"]) is Tensor
        assert torch.allclose(out.loss, expected)
    finally:
        dist.destroy_process_group()
