"""Searches side by side in one loop: beams as transformers' loop does them, images that join it.

The best continuations of an image are a few numbers: they come to the host in one transfer, and
what follows is Python, in float32's own rounding. Where scores are equal PyTorch's topk says which
comes first, as there. Images whose sentences are all found leave; with a `Feed` others come in
their place, and each finds what it would find alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvlm.generate.bans import together
from fastvlm.generate.feed import Asked, Feed
from fastvlm.generate.head import Last
from fastvlm.generate.plan import Plan, Written
from fastvlm.generate.ranking import continuations
from fastvlm.generate.searches import BeamSearch, Candidate, GreedySearch


def search(plan: Plan, ids: Tensor) -> Written:
    """ids int64 [images * beams, L] -> the best sentences of each image."""
    given: list[list[int]] = ids.tolist()
    beams = plan.config.num_beams
    rows = [given[i : i + beams] for i in range(0, len(given), beams)]
    images = [BeamSearch(i, each, plan.bans(each)) for i, each in enumerate(rows)]
    early = plan.config.early_stopping is True
    loop, last = _Loop(plan, ids.shape[1], images), plan.steps.begin(ids)
    while True:
        live, ends = loop.live, loop.advance(last)
        goes_on = any(image.improves for image in live) and not all(map(all, ends))
        if not goes_on or (early and all(image.is_full for image in live)):
            # who gets the cache finds it in order
            plan.steps.move(_order(live, live, [image.parents for image in live]))
            break
        stay = live
        if plan.steps.may_leave:
            stay = [one for one in live if not (one.is_full and (early or not one.improves))]
        last = loop.next(stay)
    return _written(plan, images, ids.shape[1])


def serve(plan: Plan, ids: Tensor, asked: Asked, feed: Feed) -> None:
    """What is asked about images that come and go: begun as ids [1 or beams, L], joined by what
    feed has, until it has no more. CannotJoin: the steps of this model are of one batch."""
    rows: list[list[int]] = ids.tolist()
    kind = GreedySearch if plan.config.num_beams == 1 else BeamSearch
    first = kind(0, rows, plan.bans(rows))
    first.tag = asked.tag
    early = plan.config.early_stopping is True
    loop, last = _Loop(plan, ids.shape[1], [first]), plan.steps.begin(ids)
    count, joins = 1, False
    while True:
        live, ends, stay = loop.live, iter(loop.advance(last)), []
        for one in live:
            # one that is fed its beginning has taken no step yet
            over = one.fed >= one.begun and one.is_over(next(ends), early)
            if over:
                feed.done(one.tag, _of_one(plan, one))
            elif feed.wants(one.tag):
                stay.append(one)
                continue
            plan.steps.leave(one.source)
        while joins and (arrival := feed.take(len(stay))) is not None:
            sources = plan.steps.join(arrival)
            for each in arrival.asked:
                row, later = list(each.begun), len(each.begun) - ids.shape[1]
                beams = [list(row) for _ in rows]
                new = kind(count, beams, plan.bans(beams, later), later)
                new.fed, new.tag, new.source = 0, each.tag, sources[each.row]
                plan.steps.enter(new.source)
                stay.append(new)
                count += 1
        if not stay:
            return
        last = loop.next(stay)
        if not joins:
            plan.steps.open()
            joins = True


class _Loop:
    """Searches that step together. begun: the tokens that the first of them began with."""

    def __init__(self, plan: Plan, begun: int, live: Sequence[Any]) -> None:
        self.plan, self.begun, self.live = plan, begun, list(live)

    def advance(self, last: Last) -> list[list[bool]]:
        """One step of each search that is ready for one: whether their candidates end."""
        plan, config = self.plan, self.plan.config
        ready = [one for one in self.live if one.is_ready]
        if len(ready) < len(self.live):
            last = last.of(_rows_of(self.live))
        if not ready:
            return []
        early, penalty = config.early_stopping is True, config.length_penalty
        scales = [(len(one.rows[0]) + 1 - one.begun) ** penalty for one in ready]
        hopes = scales
        if config.early_stopping == "never" and penalty > 0.0:
            hopes = [(config.max_length - self.begun) ** penalty] * len(ready)
        asked = self._candidates(last, ready, scales, hopes)
        # asked once a step, where all are of one length
        lengths = [len(one.rows[0]) + 1 - one.later for one in ready]
        over = {length: plan.ends.all_end(length, plan.device) for length in set(lengths)}
        ends = self._ends(ready, asked, [over[length] for length in lengths])
        for one, candidates, hits, hope in zip(ready, asked, ends, hopes):
            one.step(candidates, hits, early, hope)
        return ends

    def _candidates(
        self, last: Last, ready: list[Any], scales: list[float], hopes: list[float]
    ) -> list[list[Candidate]]:
        """Of each search its best continuations."""
        plan, beams = self.plan, len(ready[0].rows)
        groups = together([one.bans.next(one.rows) for one in ready], beams)
        found: list[list[Candidate]] = [[] for _ in ready]
        for places, banned in groups:
            theirs = last
            if len(groups) > 1:
                theirs = last.of([p * beams + beam for p in places for beam in range(beams)])
            part = [ready[place] for place in places]
            lengths = [scales[place] for place in places], [hopes[place] for place in places]
            for place, each in zip(places, continuations(plan, theirs, part, banned, *lengths)):
                found[place] = each
        return found

    def _ends(
        self, ready: list[Any], asked: list[list[Candidate]], over: list[bool]
    ) -> list[list[bool]]:
        """Whether each candidate ends its sentence."""
        criteria = self.plan.ends
        found = [[end or c.token in criteria.eos for c in each] for end, each in zip(over, asked)]
        if criteria.others:
            # a criterion sees rows of one length
            for length in {len(one.rows[0]) for one in ready}:
                places = [i for i, one in enumerate(ready) if len(one.rows[0]) == length]
                whole = [ready[i].rows[c.beam] + [c.token] for i in places for c in asked[i]]
                ended = iter(criteria.of_rows(whole, self.plan.device))
                for i in places:
                    found[i] = [end | next(ended) for end in found[i]]
        return found

    def next(self, stay: Sequence[Any]) -> Last:
        """The forward of those that stay, and of those that have come."""
        counts = [one.count for one in self.live]
        fed = [one.feed() for one in stay]
        order = _order(self.live, stay, [parents for parents, _ in fed], counts)
        tokens = [token for _, each in fed for token in each]
        sources = [one.source for one, (parents, _) in zip(stay, fed) for _ in parents]
        self.live = list(stay)
        self.plan.steps.move(order, sources)
        rows = [row for one in stay for row in one.rows]
        return self.plan.steps.next(rows, torch.tensor(tokens, device=self.plan.device))


def _rows_of(live: Sequence[Any]) -> list[int]:
    """The rows of those that are ready, among all."""
    found: list[int] = []
    row = 0
    for one in live:
        found += range(row, row + one.count) if one.is_ready else []
        row += one.count
    return found


def _order(
    live: Sequence[Any],
    stay: Sequence[Any],
    parents: list[list[int]],
    counts: list[int] | None = None,
) -> list[int]:
    """From which of the rows of now, counts of each of live, those of the next step go on: -1 where
    one begins."""
    first, row = {}, 0
    for one, count in zip(live, counts or [len(each) for each in parents]):
        first[one.number] = row
        row += count
    return [
        parent if parent < 0 else first[one.number] + parent
        for one, each in zip(stay, parents)
        for parent in each
    ]


def _written(plan: Plan, images: list[BeamSearch], begun: int) -> Written:
    config, device = plan.config, plan.device
    best_ones = [one for image in images for one in image.found[: config.num_return_sequences]]
    length = max(len(one.beams) for one in best_ones)
    fill = _filler(plan)
    tokens = [one.tokens + [fill] * (begun + length - len(one.tokens)) for one in best_ones]
    beams = [one.beams + [-1] * (length - len(one.beams)) for one in best_ones]
    return Written(
        torch.tensor(tokens, device=device),
        torch.tensor([one.score for one in best_ones], dtype=torch.float32, device=device),
        torch.tensor(beams, dtype=torch.int32, device=device).view(len(best_ones), length),
    )


def _of_one(plan: Plan, one: Any) -> list[tuple[list[int], float]]:
    """What a search found, new tokens and score, filled as `_written` does: a sentence that never
    ended is filler alone."""
    found = one.found[: plan.config.num_return_sequences]
    length, fill = max(len(each.tokens) for each in found), _filler(plan)
    return [
        (each.tokens[one.begun :] + [fill] * (length - len(each.tokens)), each.score)
        for each in found
    ]


def _filler(plan: Plan) -> int:
    """What stands behind the end of a sentence: a pad token of 0 counts as none."""
    eos, pad = plan.eos, plan.config._pad_token_tensor
    if not eos:
        return -1
    return int(pad) if pad is not None and int(pad) else eos[0]
