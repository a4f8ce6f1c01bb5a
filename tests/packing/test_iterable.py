"""pack_iterable: a stream comes out whole, within budgets, from every shard, and resumes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import GROUPS, Record, flat, image, read_back, records, samples
from torch.utils.data import DataLoader, IterableDataset

from fastvlm.packing import PackedIterable, PackingCollator, TargetBalancer, pack_iterable

BUDGETS = {"max_target_tokens": 30, "max_prompt_tokens": 20, "max_images": 4}


def packed(source: Any, collator: PackingCollator | None = None, **kwargs: Any) -> PackedIterable:
    collator = collator or PackingCollator(groups=GROUPS, pad_token_id=1)
    return pack_iterable(source, collator, **{**BUDGETS, "buffer": 16, **kwargs})


def load(dataset: PackedIterable, **kwargs: Any) -> list[dict[str, Any]]:
    loader = DataLoader(dataset, batch_size=None, collate_fn=dataset.collator, **kwargs)
    return list(loader)


def held(batches: list[dict[str, Any]]) -> Counter[Record]:
    return sum((read_back(batch) for batch in batches), Counter())


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 40),
    seed=st.integers(0, 99),
    buffer=st.sampled_from([1, 5, 1000]),
    as_records=st.booleans(),
    num_replicas=st.integers(1, 3),
)
def test_all_ranks_together_give_the_stream(
    count: int, seed: int, buffer: int, as_records: bool, num_replicas: int
) -> None:
    given_samples = samples(count, seed)
    stream = flat(given_samples) if as_records else given_samples
    batches = []
    for rank in range(num_replicas):
        batches += load(packed(stream, buffer=buffer, num_replicas=num_replicas, rank=rank))
    assert held(batches) == records(given_samples)
    for batch in batches:
        assert int((batch["labels"] != -100).sum()) <= 30
        assert int(batch["attention_mask"].sum()) <= 20
        assert len(batch["pixel_values"]) <= 4
    if buffer == 1000 and num_replicas == 1:
        # beside the cuts that budgets force, an image is in one batch
        pictures = Counter(int(p[0, 0, 0]) for batch in batches for p in batch["pixel_values"])
        whole = PackingCollator(pad_token_id=1)
        for sample in given_samples:
            tokens = whole.lengths(sample)
            if tokens[0] <= 30 and tokens[1] <= 20:
                assert pictures[sample["image_id"]] == 1


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_workers_share_the_stream(num_replicas: int) -> None:
    given_samples = samples(40, seed=1)
    batches = []
    for rank in range(num_replicas):
        shard = packed(flat(given_samples), num_replicas=num_replicas, rank=rank)
        batches += load(shard, num_workers=2)
    assert held(batches) == records(given_samples)


def test_a_trainers_batch_size_of_one_is_fine() -> None:
    given_samples = samples(20, seed=2)
    dataset = packed(given_samples)
    loader = DataLoader(dataset, batch_size=1, collate_fn=dataset.collator)
    assert held(list(loader)) == records(given_samples)


def test_generators_come_as_functions() -> None:
    def stream() -> Iterator[dict[str, Any]]:
        yield from samples(10, seed=3)

    dataset = packed(stream)
    for _ in range(2):
        assert held(load(dataset)) == records(samples(10, seed=3))
    with pytest.raises(ValueError, match="source must be an iterable that can start anew"):
        packed(stream())


def names(batches: list[Any]) -> list[Any]:
    return [[(sample.image_id, sample.targets) for sample in batch] for batch in batches]


class Stateful:
    """A source with a state of its own; it counts what it is asked to read."""

    def __init__(self, given: list[dict[str, Any]]) -> None:
        self.given, self.position, self.reads = given, 0, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start, self.position = self.position, 0
        for number in range(start, len(self.given)):
            self.position = number + 1
            self.reads += 1
            yield self.given[number]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@pytest.mark.parametrize("source_has_state", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_resumes_at_every_point(source_has_state: bool, balanced: bool) -> None:
    stream = flat(samples(30, seed=4)) if not balanced else samples(60, seed=4)

    def fresh() -> PackedIterable:
        limited = {"max_targets_per_image": 1, "balance": TargetBalancer(GROUPS)}
        collator = PackingCollator(groups=GROUPS, pad_token_id=1, **(limited if balanced else {}))
        source = Stateful(stream) if source_has_state else stream
        dataset = packed(source, collator, num_replicas=2, rank=1)
        dataset.set_epoch(1)
        return dataset

    unbroken = names(list(fresh()))
    assert len(unbroken) > 5
    for count in range(1, len(unbroken) + 1):
        first = fresh()
        reading = iter(first)
        for _ in range(count):
            next(reading)
        second = fresh()
        second.load_state_dict(first.state_dict())
        assert second.state_dict() == first.state_dict()
        assert names(list(second)) == unbroken[count:]
        if source_has_state and count == len(unbroken):
            assert second.source.reads < len(stream) / 2  # type: ignore[union-attr]
        elif not source_has_state:
            assert names(list(second)) == unbroken


def test_epochs_and_seeds_reshuffle() -> None:
    stream = samples(40, seed=5)

    def order(epoch: int, **kwargs: Any) -> list[Any]:
        dataset = packed(stream, **kwargs)
        dataset.set_epoch(epoch)
        return names(list(dataset))

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=1)
    assert order(0, shuffle=False) == order(1, shuffle=False)


def test_an_epoch_is_passed_on_to_the_source() -> None:
    class Source(Stateful):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    dataset = packed(Source([]))
    dataset.set_epoch(3)
    assert dataset.source.epoch == 3  # type: ignore[union-attr]


def test_a_source_that_deals_out_to_workers_is_not_split_again() -> None:
    class Dealing(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            from torch.utils.data import get_worker_info

            worker = get_worker_info()
            first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
            return iter(samples(20, seed=6)[first::step])

    split = packed(Dealing(), source_split="workers")
    assert held(load(split, num_workers=2)) == records(samples(20, seed=6))
    twice = packed(Dealing(), source_split="none")
    assert held(load(twice, num_workers=2)) != records(samples(20, seed=6))


def test_a_target_above_a_budget_is_an_error_or_alone() -> None:
    big = {"pixel_values": image(0), "input_ids": [4], "labels": [7] * 31}
    collator = PackingCollator(pad_token_id=1)
    with pytest.raises(ValueError, match="max_target_tokens must be at least 31"):
        list(packed([big], collator))
    small = {**big, "labels": [7]}
    batches = list(packed([small, big, small], collator, oversized="alone"))
    assert sorted(len(batch) for batch in batches) == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buffer": 0}, "buffer must be a whole number"),
        ({"num_replicas": 2, "rank": 2}, r"rank must be in \[0, num_replicas = 2\)"),
        ({"source_split": "x"}, "source_split must be one of"),
        ({"oversized": "x"}, "oversized must be one of"),
        ({"max_images": 0}, "max_images must be a whole number"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed([], **changes)


def shard_rows(shards: list[int]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for row in flat(samples(40, seed=7)[shard::4]):
            yield {**row, "pixel_values": row["pixel_values"].tolist()}


def test_datasets_streaming() -> None:
    datasets = pytest.importorskip("datasets")

    def stream() -> Any:
        return datasets.IterableDataset.from_generator(
            shard_rows, gen_kwargs={"shards": [0, 1, 2, 3]}
        )

    for workers in (0, 2):
        dataset = packed(stream(), max_target_tokens=60)
        assert dataset.source_split == "workers"
        assert held(load(dataset, num_workers=workers)) == records(samples(40, seed=7))
    unbroken = names(list(packed(stream())))
    for count in (1, len(unbroken) // 2, len(unbroken)):
        first, second = packed(stream()), packed(stream())
        reading = iter(first)
        for _ in range(count):
            next(reading)
        second.load_state_dict(first.state_dict())
        assert names(list(second)) == unbroken[count:]


def test_webdataset() -> None:
    webdataset = pytest.importorskip("webdataset")
    given_samples = samples(30, seed=8)

    def read(shards: Iterator[dict[str, str]]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            yield from given_samples[int(shard["url"]) :: 6]

    for workers in (0, 2):
        # the pipeline's own stages, but for the reading of tar files
        source = webdataset.DataPipeline(
            webdataset.SimpleShardList([str(i) for i in range(6)]),
            webdataset.split_by_worker,
            read,
        )
        dataset = packed(source)
        assert dataset.source_split == "workers"
        assert held(load(dataset, num_workers=workers)) == records(given_samples)


def test_records_of_an_image_that_follow_each_other_go_to_one_rank() -> None:
    found = []
    for rank in (0, 1):
        shard = packed(flat(samples(30, seed=9)), num_replicas=2, rank=rank, buffer=1000)
        found.append({sample.image_id for batch in shard for sample in batch})
    assert not found[0] & found[1]
    assert found[0] | found[1] == set(range(30))


def test_a_prompt_of_several_targets_is_paid_once() -> None:
    target = {"prompt_ids": [4] * 12, "label_ids": [7]}
    sample = {"pixel_values": image(0), "image_id": 0, "targets": [target] * 3}
    assert len(list(packed([sample], PackingCollator(pad_token_id=1)))) == 1
