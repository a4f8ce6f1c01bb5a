"""ResumableDataLoader: a DataLoader whose state is what the loop has had, not what was read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from fastvlm.checks import fail

_OP = "packing.ResumableDataLoader"


class ResumableDataLoader(DataLoader[Any]):
    """torch's DataLoader with set_epoch, state_dict and load_state_dict; the same arguments.

    Workers read ahead; the state counts the batches that the loop was given, so it is the same for
    any number of workers. With a batch sampler that has a state (TokenBudgetBatchSampler) nothing
    is read twice on resuming. With an IterableDataset that has one, and no workers, its state is
    kept; with workers, whose copies cannot be asked, the batches before are read again and
    thrown away, in the same order only with the same number of workers (else ValueError).

    Lightning saves and loads this state by itself (Trainer(use_distributed_sampler=False));
    ``accelerator.prepare`` puts a loader of its own in its place.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start = 0
        self._given = 0

    def set_epoch(self, epoch: int) -> None:
        """For the batch sampler, or for an iterable dataset."""
        source = self._source()
        if getattr(source, "epoch", epoch) != epoch:
            self._start = self._given = 0
        if hasattr(source, "set_epoch"):
            source.set_epoch(epoch)

    def __iter__(self) -> Any:
        first, self._start = self._start, 0
        batches = super().__iter__()
        return self._counted(batches, first)

    def state_dict(self) -> dict[str, Any]:
        """After how many batches of which epoch the loop is; plain numbers, small."""
        state: dict[str, Any] = {"batches": self._given, "num_workers": self.num_workers}
        source = self._source()
        if isinstance(source, IterableDataset):
            if self.num_workers == 0 and hasattr(source, "state_dict"):
                state["dataset"] = source.state_dict()
            state["epoch"] = getattr(source, "epoch", 0)
        elif hasattr(source, "state_dict"):
            state["batch_sampler"] = source.state_dict(self._given)
        else:
            wanted = "with a state_dict, such as TokenBudgetBatchSampler"
            raise fail(_OP, "batch_sampler", wanted, source)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next ``iter`` goes on from there."""
        source = self._source()
        if "batch_sampler" in state:
            source.load_state_dict(state["batch_sampler"])
        elif "dataset" in state and self.num_workers == 0:
            source.load_state_dict(state["dataset"])
        elif state["num_workers"] != self.num_workers:
            wanted = f"{state['num_workers']}, as when the state of an iterable dataset was taken"
            raise fail(_OP, "num_workers", wanted, self.num_workers)
        elif hasattr(source, "set_epoch"):
            source.set_epoch(state["epoch"])
        self._start = self._given = state["batches"]

    def _source(self) -> Any:
        dataset = self.dataset
        return dataset if isinstance(dataset, IterableDataset) else self.batch_sampler

    def _counted(self, batches: Iterator[Any], first: int) -> Iterator[Any]:
        self._given = first
        if self.num_workers and isinstance(self.dataset, IterableDataset):
            for _ in range(first):
                next(batches)
        for batch in batches:
            # counted before it is handed over: a state taken in the loop's body is after this batch
            self._given += 1
            yield batch
