"""First-fit-decreasing: nothing lost, no budget broken, few bins; splitting and levelling."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import corpus_lengths

from fastvlm.packing.bins import first_fit_decreasing, level, split_bins

costs_lists = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=40
)
BUDGETS = np.array([9, 12, 4])


@settings(deadline=None)
@given(costs_lists, st.randoms())
def test_every_unit_is_in_one_bin_within_all_budgets(
    costs: list[tuple[int, ...]], draw: random.Random
) -> None:
    table = np.array(costs)
    units = list(range(len(costs)))
    draw.shuffle(units)
    bins = first_fit_decreasing(units, table, BUDGETS)
    assert sorted(unit for one in bins for unit in one) == list(range(len(costs)))
    assert all((table[one].sum(0) <= BUDGETS).all() for one in bins)
    # no order of equal inputs needs more bins than another
    assert len(bins) == len(first_fit_decreasing(sorted(units), table, BUDGETS))


@settings(deadline=None)
@given(costs_lists)
def test_no_unit_would_have_fitted_into_an_earlier_bin(costs: list[tuple[int, ...]]) -> None:
    table = np.array(costs)
    bins = first_fit_decreasing(range(len(costs)), table, BUDGETS)
    for later, one in enumerate(bins):
        opener = table[one[0]]
        for earlier in bins[:later]:
            before = [unit for unit in earlier if _goes_before(table[unit], opener)]
            assert (table[before].sum(0) + opener > BUDGETS).any()


def _goes_before(cost: np.ndarray, other: np.ndarray) -> bool:
    def key(value: np.ndarray) -> tuple[float, ...]:
        return ((value / BUDGETS).max(), *reversed(value.tolist()))

    return key(cost) >= key(other)


@pytest.mark.parametrize("budget", [512, 2048, 4096])
def test_bins_are_full_on_lengths_of_the_reference_workload(budget: int) -> None:
    table = np.array(corpus_lengths(4096))[:, :1]
    bins = first_fit_decreasing(range(len(table)), table, np.array([budget]))
    fewest = math.ceil(table.sum() / budget)
    assert len(bins) <= fewest + 1
    # the bound bites: bins in the order of arrival, as they come, are more
    as_they_come = 1 + sum(1 for _ in _overflows(table[:, 0].tolist(), budget))
    assert as_they_come > len(bins)


def _overflows(lengths: list[int], budget: int) -> Iterator[int]:
    filled = 0
    for length in lengths:
        if filled + length > budget:
            yield length
            filled = 0
        filled += length


def test_a_unit_above_the_budget_is_alone() -> None:
    bins = first_fit_decreasing([0, 1, 2], np.array([[3], [20], [4]]), np.array([9]))
    assert sorted(map(sorted, bins)) == [[0, 2], [1]]


def test_splitting_halves_the_heaviest_and_stops_at_single_units() -> None:
    loads = np.array([5, 4, 3, 3, 1, 0])
    bins = [[0, 1, 2, 3], [4], [5]]
    assert sorted(map(sorted, split_bins(bins, 1, loads))) == [[0, 3], [1, 2], [4], [5]]
    assert sorted(map(sorted, split_bins(bins, 9, loads))) == [[0], [1], [2], [3], [4], [5]]
    assert sorted(map(sorted, split_bins([[4, 5]], 1, loads * 0))) == [[4], [5]]
    assert bins == [[0, 1, 2, 3], [4], [5]]


def test_levelling_evens_loads_out_within_the_budgets() -> None:
    costs = np.array([[4, 1], [4, 1], [2, 1], [2, 1]])
    loads = costs[:, 0]
    levelled = level([[0, 1], [2, 3]], costs, np.array([8, 9]), loads)
    assert [int(loads[one].sum()) for one in levelled] == [6, 6]
    kept = level([[0, 1, 2], [3]], costs, np.array([9, 3]), loads)
    assert sorted(int(loads[one].sum()) for one in kept) == [6, 6]
    # the third unit finds room in neither bin
    tight = level([[0, 3], [1, 2]], costs, np.array([6, 1]), loads)
    assert tight == [[0, 3], [1, 2]]
