"""Choosing among the targets of an image so that every (task, language) gets its share.

The rule is the dynamic balancing of Florenz's training script (arXiv 2503.09443, section on data):
a group that is at or below its share of what was drawn so far has weight 1, one above it 1e-6.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastvlm.checks import fail
from fastvlm.packing.samples import Group, Sample, Target

_OVER_ITS_SHARE = 1e-6


class TargetBalancer:
    """Draws targets and counts what it drew.

    shares: the groups, all with equal shares, or a mapping of group to share; shares are made to
    sum to 1. A group is a (task, language) pair.
    seed: draws are a function of the seed, the worker and the calls so far.

    The counts belong to one process: with several workers or ranks each balances its own draws,
    and because each meets its share the sum does. ``state_dict`` and ``load_state_dict`` carry
    counts and random state over a restart.
    ValueError: no groups, a share that is not above 0, a target of a group without a share.
    """

    def __init__(self, shares: Mapping[Group, float] | Iterable[Group], *, seed: int = 0) -> None:
        weights = shares if isinstance(shares, Mapping) else dict.fromkeys(shares, 1.0)
        if not weights:
            raise fail("packing.TargetBalancer", "shares", "of at least one group", shares)
        for group, share in weights.items():
            if not share > 0:
                raise fail("packing.TargetBalancer", f"the share of {group}", "above 0", share)
        total = sum(weights.values())
        self.shares: dict[Group, float] = {g: w / total for g, w in weights.items()}
        self.counts: dict[Group, int] = dict.fromkeys(self.shares, 0)
        self.seed = seed
        self._random = random.Random(seed)

    def reseed(self, *parts: int) -> None:
        """Starts again from no counts, with draws of their own for each tuple of parts."""
        self.counts = dict.fromkeys(self.shares, 0)
        self._random = random.Random(repr((self.seed, *parts)))

    def choose(self, targets: Sequence[Target], count: int) -> list[Target]:
        """``count`` of the targets (all, where there are no more), in their own order."""
        left = list(range(len(targets)))
        chosen: list[int] = []
        for target in targets:
            if target.group not in self.shares:
                wanted = f"one of {sorted(self.shares, key=repr)}"
                raise fail("packing.TargetBalancer", "the group of a target", wanted, target.group)
        while left and len(chosen) < count:
            total = sum(self.counts.values())
            weights = [self._weight(targets[i].group, total) for i in left]
            pick = self._random.choices(range(len(left)), weights)[0]
            index = left.pop(pick)
            self.counts[targets[index].group] += 1
            chosen.append(index)
        return [targets[i] for i in sorted(chosen)]

    def _weight(self, group: Group, total: int) -> float:
        return 1.0 if self.counts[group] <= self.shares[group] * total else _OVER_ITS_SHARE

    def state_dict(self) -> dict[str, Any]:
        return {"counts": list(self.counts.items()), "random": self._random.getstate()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """ValueError where the state was taken with other groups."""
        counts = {tuple(group): count for group, count in state["counts"]}
        if set(counts) != set(self.shares):
            wanted = f"a state of the groups {sorted(self.shares, key=repr)}"
            raise fail("packing.TargetBalancer", "state", wanted, sorted(counts, key=repr))
        self.counts = counts
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))


def limit_targets(sample: Sample, limit: int | None, balancer: TargetBalancer | None) -> Sample:
    """At most ``limit`` targets of a sample: the balancer's choice, or the first without one."""
    if limit is None:
        return sample
    if balancer is None:
        chosen = list(sample.targets[:limit])
    else:
        chosen = balancer.choose(sample.targets, limit)
    return Sample(sample.image, sample.is_pixels, sample.image_id, tuple(chosen))
