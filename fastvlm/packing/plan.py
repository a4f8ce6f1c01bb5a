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
        steps = self._steps(epoch, window, self.drop_last)
        while num_steps is not None and len(steps) > num_steps and window < len(self.costs):
            window *= 2
            steps = self._steps(epoch, window, self.drop_last)
        random = self._random(epoch, stream=1)
        if num_steps is not None and len(steps) > num_steps:
            steps = self._steps(0, self.window, self.drop_last)
        if num_steps is not None and len(steps) < num_steps:
            # nothing need be dropped then: there is a step to fill
            steps = self._steps(epoch, window, drop_last=False)
            steps = self._more_steps(steps, num_steps - len(steps))
        if self.shuffle:
            steps = [steps[i] for i in random.permutation(len(steps))]
        return self._spread_over_ranks(steps)

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, epoch, stream]))

    def _steps(self, epoch: int, window: int, drop_last: bool) -> list[Step]:
        count = len(self.costs)
        order = self._random(epoch, 0).permutation(count) if self.shuffle else np.arange(count)
        steps: list[Step] = []
        carried: list[int] = []
        bins: list[Bin] = []
        for start in range(0, count, window):
            pool = [*carried, *order[start : start + window].tolist()]
            bins = self._by_load(first_fit_decreasing(pool, self.costs, self.budgets))
            if start + window < count:
                # the emptiest bins wait for the next window, where they may be filled
                keep = (len(bins) - 1) // self.ranks * self.ranks
                carried = [unit for one in bins[keep:] for unit in one]
                bins = bins[:keep]
                steps += self._grouped(bins)
        # the call may shorten the list, so it comes first
        last = self._last_steps(steps, bins, drop_last)
        return steps + last

    def _last_steps(self, steps: list[Step], bins: list[Bin], drop_last: bool) -> list[Step]:
        """The last window's bins, made a multiple of the ranks; may take steps back from before."""
        over = len(bins) % self.ranks
        if over and drop_last:
            bins = bins[: len(bins) - over]
        elif over:
            wanted = len(bins) + self.ranks - over
            while len(bins := split_bins(bins, wanted - len(bins), self.loads)) < wanted and steps:
                bins = [*steps.pop(), *bins]
                wanted += self.ranks
            # fewer units than ranks: the first are read again, as DistributedSampler does
            bins += [list(bins[i % len(bins)]) for i in range(wanted - len(bins))]
        grouped = self._grouped(self._by_load(bins))
        if grouped:
            grouped[-1] = level(grouped[-1], self.costs, self.budgets, self.loads)
        return grouped

    def _more_steps(self, steps: list[Step], extra: int) -> list[Step]:
        kept = list(steps)
        pool: list[Bin] = []
        wanted = extra * self.ranks
        while kept and sum(len(one) - 1 for one in pool) < wanted:
            pool += kept.pop()
        pool = split_bins(pool, wanted, self.loads)
        return kept + self._grouped(self._by_load(pool))

    def _by_load(self, bins: list[Bin]) -> list[Bin]:
        return sorted(bins, key=lambda one: -int(self.loads[one].sum()))

    def _grouped(self, bins: list[Bin]) -> list[Step]:
        """Neighbours in load make a step."""
        return [bins[i : i + self.ranks] for i in range(0, len(bins), self.ranks)]

    def _spread_over_ranks(self, steps: list[Step]) -> list[Step]:
        """The heaviest batch of a step goes to the rank that had the least so far."""
        carried = np.zeros(self.ranks, dtype=np.int64)
        result = []
        for step in steps:
            placed: Step = [[] for _ in step]
            ranks = np.argsort(carried, kind="stable")
            for rank, one in zip(ranks, self._by_load(step)):
                placed[rank] = one
                carried[rank] += self.loads[one].sum()
            result.append(placed)
        return result
