"""TargetBalancer: equal shares where they can be had, the same draws for the same seed."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from records import GROUPS

from fastvlm.packing import TargetBalancer
from fastvlm.packing.samples import Group, Target


def targets(*groups: Group) -> list[Target]:
    return [Target((1,), (2,), *group) for group in groups]


def draws(balancer: TargetBalancer, images: int, seed: int = 0) -> list[Group]:
    """One target of each image; the first group is on every image, the others on few."""
    draw = random.Random(seed)
    found = []
    for _ in range(images):
        present = [GROUPS[0], *(group for group in GROUPS[1:] if draw.random() < 0.4)]
        found += [target.group for target in balancer.choose(targets(*present), 1)]
    return found


def test_shares_come_out_equal_where_the_data_allow_it() -> None:
    counts = Counter(draws(TargetBalancer(GROUPS, seed=3), 4000))
    for group in GROUPS:
        assert counts[group] / 4000 == pytest.approx(0.25, abs=0.03)
    # drawn without balance, the group that is always there has more than its share
    plain = random.Random(0)
    naive = Counter(
        plain.choice([GROUPS[0], *(g for g in GROUPS[1:] if plain.random() < 0.4)])
        for _ in range(4000)
    )
    assert naive[GROUPS[0]] / 4000 > 0.4


def test_shares_come_out_as_asked() -> None:
    shares = {GROUPS[0]: 5.0, GROUPS[1]: 3.0, GROUPS[2]: 1.0, GROUPS[3]: 1.0}
    balancer = TargetBalancer(shares)
    counts = Counter(balancer.choose(targets(*GROUPS), 1)[0].group for _ in range(2000))
    for group, share in shares.items():
        assert counts[group] / 2000 == pytest.approx(share / 10, abs=0.01)


def test_draws_hang_on_the_seed_alone() -> None:
    assert draws(TargetBalancer(GROUPS, seed=1), 200) == draws(TargetBalancer(GROUPS, seed=1), 200)
    assert draws(TargetBalancer(GROUPS, seed=1), 200) != draws(TargetBalancer(GROUPS, seed=2), 200)


def test_several_are_drawn_without_repeats_and_in_their_order() -> None:
    given = [Target((i,), (i,), *GROUPS[i % 4]) for i in range(8)]
    for seed in range(20):
        chosen = TargetBalancer(GROUPS, seed=seed).choose(given, 5)
        places = [given.index(target) for target in chosen]
        assert places == sorted(set(places))
        assert len(places) == 5
    assert TargetBalancer(GROUPS).choose(given, 99) == given


def test_a_state_goes_on_where_it_was_taken() -> None:
    balancer, other = TargetBalancer(GROUPS, seed=5), TargetBalancer(GROUPS, seed=6)
    draws(balancer, 50)
    other.load_state_dict(balancer.state_dict())
    assert draws(balancer, 100, seed=1) == draws(other, 100, seed=1)
    with pytest.raises(ValueError, match="state must be a state of the groups"):
        TargetBalancer(GROUPS[:2]).load_state_dict(balancer.state_dict())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="shares must be of at least one group"):
        TargetBalancer([])
    with pytest.raises(ValueError, match=r"the share of .* must be above 0"):
        TargetBalancer({GROUPS[0]: 0.0})
    with pytest.raises(ValueError, match="the group of a target must be one of"):
        TargetBalancer(GROUPS[:1]).choose(targets(GROUPS[1]), 1)
