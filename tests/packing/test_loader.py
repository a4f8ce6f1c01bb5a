"""ResumableDataLoader: the state is what the loop has had, whatever the workers read ahead."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from records import GROUPS, read_back, records, samples
from torch.utils.data import DataLoader

from fastvlm.packing import (
    PackingCollator,
    ResumableDataLoader,
    TokenBudgetBatchSampler,
    pack_iterable,
)

SAMPLES = samples(40, seed=9)


def collator() -> PackingCollator:
    return PackingCollator(groups=GROUPS, pad_token_id=1)


def map_loader(workers: int, epoch: int = 0, kind: Any = ResumableDataLoader) -> Any:
    pack = collator()
    sampler = TokenBudgetBatchSampler(
        [pack.lengths(sample) for sample in SAMPLES], max_target_tokens=40, seed=1
    )
    loader = kind(SAMPLES, batch_sampler=sampler, collate_fn=pack, num_workers=workers)
    if kind is ResumableDataLoader:
        loader.set_epoch(epoch)
    return loader


def stream_loader(workers: int) -> ResumableDataLoader:
    packed = pack_iterable(SAMPLES, collator(), max_target_tokens=40, buffer=8)
    return ResumableDataLoader(
        packed, batch_size=None, collate_fn=packed.collator, num_workers=workers
    )


def same(batches: list[Any], others: list[Any]) -> bool:
    return len(batches) == len(others) and all(
        torch.equal(one["labels"], other["labels"]) for one, other in zip(batches, others)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_whole_in_a_loader_with_workers(workers: int) -> None:
    for kind in (DataLoader, ResumableDataLoader):
        loader = map_loader(workers, kind=kind)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert sum((read_back(batch) for batch in batches), Counter()) == records(SAMPLES)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (0, 2), (2, 1)])
def test_resumes_with_another_number_of_workers(before: int, after: int) -> None:
    unbroken = list(map_loader(0, epoch=1))
    following = list(map_loader(0, epoch=2))
    for count in (1, 2, len(unbroken) - 1, len(unbroken)):
        loader = map_loader(before, epoch=1)
        reading = iter(loader)
        for _ in range(count):
            next(reading)
        state = loader.state_dict()
        assert (state["batches"], state["batch_sampler"]["epoch"]) == (count, 1)
        resumed = map_loader(after)
        resumed.load_state_dict(state)
        assert resumed.state_dict()["batches"] == count
        resumed.set_epoch(1)
        assert same(list(resumed), unbroken[count:])
        resumed.set_epoch(2)
        assert same(list(resumed), following)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes(workers: int) -> None:
    unbroken = list(stream_loader(workers))
    for count in (1, 5, len(unbroken)):
        loader = stream_loader(workers)
        reading = iter(loader)
        for _ in range(count):
            next(reading)
        resumed = stream_loader(workers)
        resumed.load_state_dict(loader.state_dict())
        assert same(list(resumed), unbroken[count:])


def test_a_stream_with_workers_needs_as_many() -> None:
    loader = stream_loader(2)
    next(iter(loader))
    with pytest.raises(ValueError, match="num_workers must be 2"):
        stream_loader(1).load_state_dict(loader.state_dict())


def test_a_batch_sampler_without_a_state_is_refused() -> None:
    loader = ResumableDataLoader(SAMPLES, batch_size=2, collate_fn=collator())
    with pytest.raises(ValueError, match="batch_sampler must be with a state_dict"):
        loader.state_dict()


def test_torchdatas_stateful_loader_agrees() -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    unbroken = list(map_loader(0))

    def fresh(workers: int) -> Any:
        return map_loader(workers, kind=torchdata.StatefulDataLoader)

    for workers in (0, 2):
        loader = fresh(workers)
        reading = iter(loader)
        for _ in range(3):
            next(reading)
        resumed = fresh(workers)
        resumed.load_state_dict(loader.state_dict())
        assert same(list(resumed), unbroken[3:])


def test_nothing_but_torch_is_needed() -> None:
    packages = "transformers", "accelerate", "datasets", "webdataset", "torchdata"
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({packages!r}))\n"
        "import fastvlm.packing as packing\n"
        "print([getattr(packing, name).__name__ for name in packing.__all__])"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_device_moves_leave_the_number_of_groups() -> None:
    batch = collator()(SAMPLES[:3])
    moved = send_to_device(batch, torch.device("meta"))
    assert moved["num_groups"] == len(GROUPS)
    assert all(value.device.type == "meta" for name, value in moved.items() if name != "num_groups")
