"""The plan of an epoch: which units share a batch, and which batches make a step of all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastvlm.packing.bins import Bin, Costs, first_fit_decreasing, level, split_bins

Step = list[Bin]


@dataclass(frozen=True)
class Planner:
    """Plans epochs; a plan is a function of these values and the epoch, on any machine.

    costs [units, budgets], budgets [budgets], loads [units]: what ranks are balanced by.
    """

    costs: Costs
    budgets: Costs
    loads: NDArray[np.int64]
    ranks: int
    window: int
    shuffle: bool
    drop_last: bool
    seed: int

    def plan(self, epoch: int, num_steps: int | None = None) -> list[Step]:
        """The steps of an epoch, ``num_steps`` of them if that is given.

        Where the shuffled windows happen to need more steps than that, larger windows are tried,
        which fill batches better; at last the batches of epoch 0 are taken, in another order.
        Where they need fewer, batches are split.
        """
        window = self.window
        bins = self._bins(epoch, window)
        if num_steps is None:
            # dropping rounds down; else the last step is filled by splitting
            num_steps = (len(bins) + (0 if self.drop_last else self.ranks - 1)) // self.ranks
        most = (num_steps + 1) * self.ranks - 1 if self.drop_last else num_steps * self.ranks
        while len(bins) > most and window < len(self.costs):
            window *= 2
            bins = self._bins(epoch, window)
        if len(bins) > most:
            bins = self._bins(0, self.window)
        steps = self._grouped(self._filled(bins, num_steps * self.ranks))
        if self.shuffle:
            steps = [steps[i] for i in self._random(epoch, 1).permutation(len(steps))]
        return self._spread_over_ranks(steps)

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, epoch, stream]))

    def _bins(self, epoch: int, window: int) -> list[Bin]:
        count = len(self.costs)
        order = self._random(epoch, 0).permutation(count) if self.shuffle else np.arange(count)
        bins: list[Bin] = []
        carried: list[int] = []
        for start in range(0, count, window):
            pool = [*carried, *order[start : start + window].tolist()]
            found = self._by_load(first_fit_decreasing(pool, self.costs, self.budgets))
            # the emptiest bin waits for the next window, where it may be filled
            carried = found.pop() if start + window < count else []
            bins += found
        return bins

    def _filled(self, bins: list[Bin], wanted: int) -> list[Bin]:
        """``wanted`` bins: without the lightest, or with heavy ones split.

        Where single units are all there is to split, some come twice.
        """
        if len(bins) > wanted:
            kept = {id(one) for one in self._by_load(bins)[:wanted]}
            return [one for one in bins if id(one) in kept]
        bins = split_bins(bins, wanted - len(bins), self.loads)
        return bins + [list(bins[i % len(bins)]) for i in range(wanted - len(bins))]

    def _by_load(self, bins: list[Bin]) -> list[Bin]:
        return sorted(bins, key=lambda one: -int(self.loads[one].sum()))

    def _grouped(self, bins: list[Bin]) -> list[Step]:
        """Neighbours make a step: in load, or in order where the order is to be kept."""
        bins = self._by_load(bins) if self.shuffle else bins
        steps = [bins[i : i + self.ranks] for i in range(0, len(bins), self.ranks)]
        if steps:
            steps[-1] = level(steps[-1], self.costs, self.budgets, self.loads)
        return steps

    def _spread_over_ranks(self, steps: list[Step]) -> list[Step]:
        """The heaviest batch of a step goes to the rank that had the least so far."""
        so_far = np.zeros(self.ranks, dtype=np.int64)
        result = []
        for step in steps:
            placed: Step = [[] for _ in step]
            for rank, one in zip(np.argsort(so_far, kind="stable"), self._by_load(step)):
                placed[rank] = one
                so_far[rank] += self.loads[one].sum()
            result.append(placed)
        return result
