"""pack_iterable: the same batches from a stream, whose length and lengths nobody knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from fastvlm.checks import choice, fail
from fastvlm.packing.bins import first_fit_decreasing
from fastvlm.packing.collator import PackingCollator
from fastvlm.packing.sampler import budget_array
from fastvlm.packing.samples import PreparedSample
from fastvlm.packing.tokens import count

_OP = "packing.pack_iterable"
Source = Iterable[Any] | Callable[[], Iterable[Any]]


def pack_iterable(
    source: Source,
    collator: PackingCollator,
    *,
    max_target_tokens: int | None,
    max_prompt_tokens: int | None = None,
    max_images: int | None = None,
    buffer: int = 1024,
    num_replicas: int = 1,
    rank: int = 0,
    source_split: str = "auto",
    shuffle: bool = True,
    seed: int = 0,
    oversized: str = "error",
) -> PackedIterable:
    """An IterableDataset of packed lists of samples, ready for ``collator``.

    Load it with ``DataLoader(packed, batch_size=None, collate_fn=collator)``, or with a batch size
    of 1 where a trainer insists on one.

    source: an iterable of samples (a WebDataset, a streaming ``datasets.IterableDataset``, ...), or
        a function that returns one; one that starts anew at every ``iter``, so not a generator.
    collator: cuts, tokenizes and (with its ``balance``) chooses targets before they are weighed.
    max_target_tokens, max_prompt_tokens, max_images: as for TokenBudgetBatchSampler, in exact
        tokens: distinct prompts count once. An image with more targets than a batch holds is cut.
    buffer: records in which images are grouped and batches are filled, first-fit-decreasing;
        their batches leave in random order (``shuffle``), and nothing is carried beyond it.
    num_replicas, rank: of the data-parallel ranks. Every rank and worker reads the source and
        keeps one in so many images (records of one image that follow each other stay together).
    source_split: what the source itself deals out: "none", "workers" (each loader worker gets
        other records), "all" (each rank as well); "auto": "workers" for WebDataset and
        ``datasets``, which do so, "none" for anything else.
    oversized: of a single target above a budget: "error", or "alone" in its batch.

    ``set_epoch`` reshuffles, and is passed on to the source. ``state_dict`` goes back to the start
    of the buffer at hand: with the source's own state where it has ``state_dict`` and
    ``load_state_dict``, else by reading as many records again, which a source that comes in
    another order each time makes wrong. Under plain DataLoader workers see ResumableDataLoader;
    torchdata's StatefulDataLoader asks the workers' copies.

    Ranks may get different numbers of batches: a stream ends where it ends. Bound the steps.
    ValueError: see PackingCollator; a source that is an iterator; a target above a budget.
    """
    return PackedIterable(
        source,
        collator,
        (max_target_tokens, max_prompt_tokens, max_images),
        buffer,
        (num_replicas, rank),
        source_split,
        shuffle,
        seed,
        oversized,
    )


class PackedIterable(IterableDataset[list[PreparedSample]]):
    """What ``pack_iterable`` returns."""

    def __init__(
        self,
        source: Source,
        collator: PackingCollator,
        budgets: tuple[int | None, int | None, int | None],
        buffer: int,
        ranks: tuple[int, int],
        source_split: str,
        shuffle: bool,
        seed: int,
        oversized: str,
    ) -> None:
        for name, budget in zip(("max_target_tokens", "max_prompt_tokens", "max_images"), budgets):
            count(_OP, name, budget)
        if type(buffer) is not int or buffer < 1:
            raise fail(_OP, "buffer", "a whole number, 1 or more", buffer)
        num_replicas, rank = ranks
        if type(num_replicas) is not int or num_replicas < 1 or rank not in range(num_replicas):
            raise fail(_OP, "rank", f"in [0, num_replicas = {num_replicas})", rank)
        choice(_OP, "source_split", source_split, ("auto", "none", "workers", "all"))
        choice(_OP, "oversized", oversized, ("error", "alone"))
        if isinstance(source, Iterator):
            wanted = "an iterable that can start anew, or a function that returns one"
            raise fail(_OP, "source", wanted, source)
        self.source, self.collator = source, collator
        self.budgets = budget_array(*budgets)
        self.buffer, self.shuffle, self.seed, self.oversized = buffer, shuffle, seed, oversized
        self.num_replicas, self.rank = num_replicas, rank
        self.source_split = _own_split(source) if source_split == "auto" else source_split
        self.epoch = 0
        self._at = self._beginning()
        self._resumed = False

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch = epoch
            self._at, self._resumed = self._beginning(), False
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where this copy stands (of one worker of one rank): plain numbers and ids."""
        return {"epoch": self.epoch, **self._at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next ``iter`` goes on from there."""
        self.set_epoch(state["epoch"])
        self._at = {key: value for key, value in state.items() if key != "epoch"}
        self._resumed = True

    def __iter__(self) -> Iterator[list[PreparedSample]]:
        if not self._resumed:
            self._at = self._beginning()
        shard, num_shards = self._shard()
        balance = self.collator.balance
        worker = get_worker_info()
        self.collator.seed_balance(self.epoch, self.rank, 0 if worker is None else worker.id)
        if balance is not None and self._at["balance"] is not None:
            balance.load_state_dict(self._at["balance"])
        source: Any = self.source if isinstance(self.source, Iterable) else self.source()
        resumed, self._resumed = self._resumed, False
        if resumed and self._at["source"] is not None:
            source.load_state_dict(self._at["source"])
            records = iter(source)
        else:
            records = islice(source, self._at["read"], None)
        # what a resumed run finds at the start of the buffer, kept while the buffer is packed
        while True:
            start = dict(self._at)
            buffered: list[Any] = []
            for record in records:
                start["read"] += 1
                image = record.get("image_id") if isinstance(record, Mapping) else None
                if image is None or image != start["image"]:
                    start["images"] += 1
                start["image"] = image
                if start["images"] % num_shards == shard:
                    buffered.append(record)
                    if len(buffered) == self.buffer:
                        break
            if not buffered:
                return
            batches = self._packed(buffered, self._at["buffers"], shard)
            done = self._at["done"]
            # taken before the first batch leaves: the state in the loop's body is after it
            after = dict(start, done=0, buffers=start["buffers"] + 1)
            after["source"] = source.state_dict() if _has_state(source) else None
            after["balance"] = None if balance is None else balance.state_dict()
            for number, batch in enumerate(batches):
                if number >= done:
                    self._at["done"] = number + 1
                    yield batch
            self._at = after

    def _beginning(self) -> dict[str, Any]:
        """Records read, images met and the last one's id; buffers packed, batches given of one."""
        none = dict.fromkeys(("image", "source", "balance"))
        return {"read": 0, "images": -1, "buffers": 0, "done": 0, **none}

    def _shard(self) -> tuple[int, int]:
        """Which of how many parts of the source this copy keeps."""
        worker = get_worker_info()
        if self.source_split == "all":
            return 0, 1
        if worker is None or self.source_split == "workers":
            return self.rank, self.num_replicas
        return (
            self.rank * worker.num_workers + worker.id,
            self.num_replicas * worker.num_workers,
        )

    def _packed(self, records: list[Any], number: int, shard: int) -> list[list[PreparedSample]]:
        units, costs = self._units(records)
        bins = first_fit_decreasing(range(len(units)), costs, self.budgets)
        if self.shuffle:
            worker = get_worker_info()
            parts = [self.seed, self.epoch, shard, 0 if worker is None else worker.id, number]
            order = np.random.Generator(np.random.PCG64(parts)).permutation(len(bins))
            bins = [bins[i] for i in order]
        return [[sample for unit in one for sample in units[unit]] for one in bins]

    def _units(self, records: list[Any]) -> tuple[list[list[PreparedSample]], Any]:
        """The targets of an image together, as many as the budgets allow."""
        units: list[list[PreparedSample]] = []
        costs: list[np.ndarray] = []
        prompts: list[set[Any]] = []
        current: dict[Any, int] = {}
        for sample in map(self.collator.prepare, records):
            for target in sample.targets:
                piece = PreparedSample(sample.image, sample.is_pixels, sample.image_id, (target,))
                alone = np.array([len(target.labels), len(target.prompt), 1])
                self._refuse(alone)
                unit = current.get(sample.identity)
                if unit is not None:
                    new_prompt = target.prompt not in prompts[unit]
                    joined = costs[unit] + alone * np.array([1, int(new_prompt), 0])
                    if (joined <= self.budgets).all():
                        units[unit].append(piece)
                        costs[unit] = joined
                        prompts[unit].add(target.prompt)
                        continue
                current[sample.identity] = len(units)
                units.append([piece])
                costs.append(alone)
                prompts.append({target.prompt})
        return units, np.array(costs, dtype=np.int64).reshape(-1, 3)

    def _refuse(self, cost: np.ndarray) -> None:
        if self.oversized == "alone" or (cost <= self.budgets).all():
            return
        name = "max_target_tokens" if cost[0] > self.budgets[0] else "max_prompt_tokens"
        column = 0 if name == "max_target_tokens" else 1
        wanted = f"at least {cost[column]}, a single target's tokens, or oversized='alone'"
        raise fail(_OP, name, wanted, int(self.budgets[column]))


def _own_split(source: Any) -> str:
    """WebDataset and datasets deal out among loader workers by themselves."""
    roots = {kind.__module__.partition(".")[0] for kind in type(source).__mro__}
    return "workers" if roots & {"webdataset", "datasets"} else "none"


def _has_state(source: Any) -> bool:
    return hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
