"""Bins: which units go together, by first-fit-decreasing under several budgets at once.

A unit is what is never taken apart (the samples of one image); its cost is one number for each
budget. Costs are int64 arrays [units, budgets], bins are lists of unit indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

Costs = NDArray[np.int64]
Bin = list[int]


def first_fit_decreasing(units: Sequence[int], costs: Costs, budgets: Costs) -> list[Bin]:
    """Packs ``units`` (indices into ``costs``); equal inputs in another order fill bins equally.

    The largest go first, largest meaning the largest share of any budget; each goes into the first
    bin with room for it. A unit above a budget gets a bin of its own.
    """
    chosen = np.asarray(units, dtype=np.int64)
    if not len(chosen):
        return []
    needed = costs[chosen]
    share = (needed / np.maximum(budgets, 1)).max(1)
    # ties are broken by the costs themselves, so that the number of bins does not hang on the order
    decreasing = np.lexsort((*needed.T, share))[::-1]
    room = np.empty((len(chosen), len(budgets)), dtype=np.int64)
    bins: list[Bin] = []
    first_open = 0
    smallest = needed.min(0)
    for position in decreasing:
        need = needed[position]
        fits = (room[first_open : len(bins)] >= need).all(1)
        index = int(fits.argmax()) if len(fits) else 0
        if len(fits) and fits[index]:
            bins[first_open + index].append(int(chosen[position]))
            room[first_open + index] -= need
        else:
            room[len(bins)] = budgets - need
            bins.append([int(chosen[position])])
        while first_open < len(bins) and (room[first_open] < smallest).any():
            first_open += 1
    return bins


def split_bins(bins: Sequence[Bin], extra: int, loads: NDArray[np.int64]) -> list[Bin]:
    """The same units in ``extra`` more bins (fewer where single units are all that is left).

    The heaviest bin is halved again and again: budgets hold, because halves cost less.
    """
    result = [list(one) for one in bins]
    heaviest = [(-int(loads[one].sum()), i) for i, one in enumerate(result) if len(one) > 1]
    heapify(heaviest)
    for _ in range(extra):
        if not heaviest:
            break
        _, index = heappop(heaviest)
        halves: list[Bin] = [[], []]
        weights = [0, 0]
        for unit in sorted(result[index], key=lambda u: -int(loads[u])):
            # an empty half comes first even where all loads are 0
            lighter = min((0, 1), key=lambda h: (weights[h], len(halves[h])))
            halves[lighter].append(unit)
            weights[lighter] += int(loads[unit])
        result[index] = halves[0]
        result.append(halves[1])
        for half, weight, place in zip(halves, weights, (index, len(result) - 1)):
            if len(half) > 1:
                heappush(heaviest, (-weight, place))
    return result


def level(bins: Sequence[Bin], costs: Costs, budgets: Costs, loads: NDArray[np.int64]) -> list[Bin]:
    """The same units in as many bins, as evenly loaded as greedy choice makes them.

    Heaviest unit first, to the lightest bin that has room. Where a unit finds no room, or the
    spread is no smaller than it was, the bins stay as they are.
    """
    result: list[Bin] = [[] for _ in bins]
    room = np.repeat(budgets[None], len(bins), axis=0)
    weight = np.zeros(len(bins), dtype=np.int64)
    for unit in sorted((u for one in bins for u in one), key=lambda u: -int(loads[u])):
        order = sorted(range(len(bins)), key=lambda i: (int(weight[i]), len(result[i])))
        fitting = [i for i in order if (room[i] >= costs[unit]).all()]
        if not fitting:
            return [list(one) for one in bins]
        result[fitting[0]].append(unit)
        room[fitting[0]] -= costs[unit]
        weight[fitting[0]] += loads[unit]
    before = [int(loads[one].sum()) for one in bins]
    if not all(result) or weight.max() - weight.min() >= max(before) - min(before):
        return [list(one) for one in bins]
    return result
