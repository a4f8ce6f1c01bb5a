"""TokenBudgetBatchSampler: nothing lost or doubled, budgets kept, ranks even, resumable."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from records import corpus_lengths

from fastvlm.packing import TokenBudgetBatchSampler
from fastvlm.packing.bins import first_fit_decreasing

lengths_lists = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=60
)
BUDGETS = {"max_target_tokens": 9, "max_prompt_tokens": 12, "max_images": 4}


def ranks(lengths: Any, num_replicas: int, epoch: int = 0, **kwargs: Any) -> list[list[list[int]]]:
    """The batches of each rank."""
    result = []
    for rank in range(num_replicas):
        sampler = TokenBudgetBatchSampler(
            lengths, num_replicas=num_replicas, rank=rank, **{**BUDGETS, **kwargs}
        )
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        result.append(batches)
    return result


@settings(max_examples=150, deadline=None)
@given(
    lengths=lengths_lists,
    num_replicas=st.integers(1, 4),
    window=st.sampled_from([1, 2, 7, 100]),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_an_epoch_has_every_sample_once_within_the_budgets(
    lengths: list[tuple[int, int, int]], num_replicas: int, window: int, epoch: int, shuffle: bool
) -> None:
    dealt = ranks(lengths, num_replicas, epoch, window=window, shuffle=shuffle, seed=1)
    assert len({len(batches) for batches in dealt}) == 1
    batches = [one for rank in dealt for one in rank]
    assert all(batches)
    for one in batches:
        assert (np.array(lengths)[one].sum(0) <= [9, 12, 4]).all()
    seen = Counter(index for one in batches for index in one)
    assert set(seen) == set(range(len(lengths)))
    repeated = seen.total() - len(seen)
    assert repeated < num_replicas
    assert not repeated or max(map(len, batches)) == 1


@settings(max_examples=150, deadline=None)
@given(lengths=lengths_lists, num_replicas=st.integers(1, 4), window=st.sampled_from([2, 7, 100]))
def test_dropping_the_last_leaves_out_less_than_a_step(
    lengths: list[tuple[int, int, int]], num_replicas: int, window: int
) -> None:
    arguments = {"window": window, "drop_last": True}
    if len(ranks(lengths, 1, window=window)[0]) < num_replicas:
        # not one step for all ranks
        with pytest.raises(ValueError, match="drop_last must be False"):
            ranks(lengths, num_replicas, **arguments)
        return
    for epoch in (0, 1, 2):
        dealt = ranks(lengths, num_replicas, epoch, **arguments)
        seen = Counter(index for rank in dealt for one in rank for index in one)
        assert max(seen.values()) == 1
        left_out = sorted(set(range(len(lengths))) - set(seen))
        # what is left out would not have made a batch for each rank
        rest = first_fit_decreasing(left_out, np.array(lengths), np.array([9, 12, 4]))
        assert len(rest) < max(num_replicas, 1)


@settings(deadline=None)
@given(lengths=lengths_lists, num_replicas=st.integers(1, 3), window=st.sampled_from([3, 10]))
def test_every_epoch_is_as_long(
    lengths: list[tuple[int, int, int]], num_replicas: int, window: int
) -> None:
    sampler = TokenBudgetBatchSampler(lengths, num_replicas=num_replicas, window=window, **BUDGETS)
    for epoch in range(6):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)


@settings(deadline=None)
@given(lengths=lengths_lists, num_replicas=st.integers(1, 4))
def test_rank_none_gives_all_ranks_batches_step_by_step(
    lengths: list[tuple[int, int, int]], num_replicas: int
) -> None:
    every = TokenBudgetBatchSampler(lengths, num_replicas=num_replicas, rank=None, **BUDGETS)
    batches = list(every)
    assert len(every) == len(batches)
    for rank, own in enumerate(ranks(lengths, num_replicas)):
        assert batches[rank::num_replicas] == own


def test_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = corpus_lengths(300)

    def order(seed: int, epoch: int) -> list[list[int]]:
        budgets = {"max_target_tokens": 512, "max_prompt_tokens": None, "max_images": None}
        return ranks(lengths, 1, epoch, seed=seed, **budgets)[0]

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 2)
    assert order(3, 1) != order(4, 1)
    # batches themselves differ from epoch to epoch, not only their order
    first, second = ({frozenset(one) for one in order(3, epoch)} for epoch in (1, 2))
    assert len(first & second) <= len(first) // 10


@pytest.mark.parametrize("num_replicas", [1, 2, 8])
def test_batches_are_full_and_ranks_even_on_the_reference_workload(num_replicas: int) -> None:
    lengths = corpus_lengths(20_000)
    tokens = np.array(lengths)
    budgets = {"max_target_tokens": 2048, "max_prompt_tokens": None, "max_images": None}
    dealt = ranks(lengths, num_replicas, window=2048, **budgets)
    decoder = np.array([[tokens[one, 0].sum() for one in rank] for rank in dealt])
    assert decoder.sum() / (decoder.size * 2048) > 0.98
    budgets["max_prompt_tokens"] = 2048
    dealt = ranks(lengths, num_replicas, window=2048, **budgets)
    load = np.array([[tokens[one, :2].sum() for one in rank] for rank in dealt])
    # the slowest rank of a step sets its pace: what the others wait for it
    waiting = 1 - load.sum() / (load.max(0).sum() * num_replicas)
    assert waiting < 0.01
    assert load.sum(1).max() / load.sum(1).min() < 1.005


@settings(max_examples=30, deadline=None)
@given(
    lengths=lengths_lists,
    num_replicas=st.integers(1, 3),
    every_rank=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_resumes_at_every_point(
    lengths: list[tuple[int, int, int]], num_replicas: int, every_rank: bool, epoch: int
) -> None:
    def fresh() -> TokenBudgetBatchSampler:
        rank = None if every_rank else num_replicas - 1
        return TokenBudgetBatchSampler(
            lengths, num_replicas=num_replicas, rank=rank, window=7, **BUDGETS
        )

    unbroken = fresh()
    unbroken.set_epoch(epoch)
    batches = list(unbroken)
    per_step = num_replicas if every_rank else 1
    for steps in range(len(batches) // per_step + 1):
        first = fresh()
        first.set_epoch(epoch)
        drawing = iter(first)
        for _ in range(steps * per_step):
            next(drawing)
        state = first.state_dict()
        assert state == fresh_state(fresh(), epoch, steps)
        second = fresh()
        second.load_state_dict(state)
        assert second.state_dict() == state
        second.set_epoch(epoch)
        going_on = iter(second)
        for number in range(steps * per_step, len(batches)):
            assert next(going_on) == batches[number]
            # what is drawn after resuming counts from the epoch's start too
            assert second.state_dict()["batches"] == (number + 1) // per_step
        assert list(going_on) == []
        # only once: the next pass is a whole one
        assert list(second) == batches


def fresh_state(sampler: TokenBudgetBatchSampler, epoch: int, steps: int) -> dict[str, int]:
    sampler.set_epoch(epoch)
    return sampler.state_dict(consumed=steps)


def test_a_state_means_nothing_to_another_sampler() -> None:
    lengths = corpus_lengths(50)
    arguments: dict[str, Any] = {"max_target_tokens": 256, "seed": 1}
    state = TokenBudgetBatchSampler(lengths, **arguments).state_dict(consumed=2)
    for change in (
        {"seed": 2},
        {"max_target_tokens": 255},
        {"num_replicas": 2},
        {"window": 3},
        {"shuffle": False},
        {"drop_last": True},
        {"image_ids": [i // 2 for i in range(50)]},
    ):
        with pytest.raises(ValueError, match="the state was taken with other lengths"):
            TokenBudgetBatchSampler(lengths, **{**arguments, **change}).load_state_dict(state)
    with pytest.raises(ValueError, match="the state was taken with other lengths"):
        TokenBudgetBatchSampler(lengths[:-1], **arguments).load_state_dict(state)
    # another rank of the same run is at the same place
    TokenBudgetBatchSampler(lengths, **arguments).load_state_dict(state)


def test_an_epoch_before_the_loaded_one_is_refused() -> None:
    sampler = TokenBudgetBatchSampler(corpus_lengths(50), max_target_tokens=256)
    sampler.set_epoch(2)
    state = sampler.state_dict(consumed=3)
    sampler.load_state_dict(state)
    with pytest.raises(ValueError, match="epoch must be 2 or later"):
        sampler.set_epoch(0)
    sampler.set_epoch(3)
    assert len(list(sampler)) == len(sampler)


@settings(deadline=None)
@given(lengths=lengths_lists, data=st.data())
def test_records_of_an_image_share_a_batch(
    lengths: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    count = len(lengths)
    ids = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    table = np.array([(target, prompt, 1) for target, prompt, _ in lengths])
    batches = ranks(table, 1, image_ids=ids)[0]
    assert sorted(index for one in batches for index in one) == list(range(count))
    for one in batches:
        assert (table[one, :2].sum(0) <= [9, 12]).all()
        assert len({ids[index] for index in one}) <= 4
    for image in set(ids):
        rows = [index for index in range(count) if ids[index] == image]
        if (table[rows, :2].sum(0) <= [9, 12]).all():
            assert (
                len({number for number, one in enumerate(batches) for i in one if i in rows}) == 1
            )


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_lengths_may_be_given_in_several_ways(kind: Any) -> None:
    lengths = [5, 3, 9, 1, 1]
    full = ranks([(n, 0, 1) for n in lengths], 1)
    assert ranks(kind(lengths), 1) == full
    assert ranks(kind([(n, 0) for n in lengths]), 1) == full
    assert ranks(lambda index: lengths[index], 1, num_samples=5) == full


def test_a_sample_above_a_budget_is_an_error_or_alone() -> None:
    with pytest.raises(
        ValueError, match=r"max_target_tokens must be at least 11, .*sample 2 has 10"
    ):
        TokenBudgetBatchSampler([1, 2, 10, 11], max_target_tokens=9)
    with pytest.raises(ValueError, match="max_prompt_tokens must be at least 5"):
        TokenBudgetBatchSampler([(1, 5)], max_target_tokens=9, max_prompt_tokens=4)
    sampler = TokenBudgetBatchSampler([1, 2, 10, 11], max_target_tokens=9, oversized="alone")
    assert sorted(map(sorted, sampler)) == [[0, 1], [2], [3]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_target_tokens": 0}, "max_target_tokens must be a whole number, 1 or more"),
        ({"max_images": 1.5}, "max_images must be a whole number, 1 or more"),
        ({"num_replicas": 0}, "num_replicas must be a whole number"),
        ({"rank": 1}, r"rank must be None or in \[0, 1\)"),
        ({"window": 0}, "window must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"oversized": "keep"}, "oversized must be one of 'error', 'alone'"),
        ({"lengths": [1.5]}, "lengths must be whole numbers"),
        ({"lengths": [[1, 2, 3, 4]]}, "lengths must be whole numbers"),
        ({"lengths": [-1]}, "lengths must be 0 or more"),
        ({"lengths": len}, "num_samples must be given"),
        ({"image_ids": [1, 2]}, "image_ids must be of one entry for each of 1 samples"),
        ({"num_replicas": 2, "drop_last": True}, "drop_last must be False"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    arguments = {"lengths": [3], "max_target_tokens": 9}
    assert list(TokenBudgetBatchSampler(**arguments)) == [[0]]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        TokenBudgetBatchSampler(**{**arguments, **changes})


def test_an_image_is_paid_once() -> None:
    ids = ["a", "b", "a", "b", "a"]
    sampler = TokenBudgetBatchSampler([1] * 5, max_target_tokens=9, max_images=2, image_ids=ids)
    assert len(sampler) == 1


def test_nothing_gives_nothing() -> None:
    sampler = TokenBudgetBatchSampler([], max_target_tokens=9)
    assert (len(sampler), list(sampler)) == (0, [])


def test_fewer_samples_than_ranks_are_repeated_as_distributed_sampler_does() -> None:
    assert sorted(map(tuple, (rank[0] for rank in ranks([1, 1], 3)))) in (
        [(0,), (0,), (1,)],
        [(0,), (1,), (1,)],
    )
