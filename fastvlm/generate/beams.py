"""Beam search, as transformers' loop does it; images whose sentences are all found leave.

The best continuations of an image are a few numbers: they come to the host in one transfer, and
what follows is Python, in float32's own rounding. Where scores are equal PyTorch's topk says which
comes first, as there.
"""

from __future__ import annotations

from ctypes import c_float
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvlm.generate.bans import Banned
from fastvlm.generate.head import Last, best_of_rows
from fastvlm.generate.plan import Plan, Written

# what transformers adds to the score of what may not be chosen
_FAR = -1.0e9


@dataclass
class Sentence:
    """A place among the best that have ended. beams: the row that each new token was written in."""

    score: float
    tokens: list[int]
    beams: list[int]
    ended: bool = False


class Candidate(NamedTuple):
    """A beam and a token after it. value: summed log-probabilities; ranked: by their length;
    hoped: by the length that the rest of the search hopes for."""

    beam: int
    token: int
    value: float
    ranked: float
    hoped: float


class Image:
    """The beams of one image. number: among all of them."""

    def __init__(self, number: int, rows: list[list[int]]) -> None:
        self.number, self.rows = number, rows
        self.paths: list[list[int]] = [[] for _ in rows]
        self.scores = [0.0] + [_FAR] * (len(rows) - 1)
        self.found = [Sentence(_FAR, rows[0], []) for _ in rows]
        self.improves = True
        self.parents: list[int] = []

    @property
    def is_full(self) -> bool:
        return all(one.ended for one in self.found)

    def step(self, candidates: list[Candidate], ends: list[bool], early: bool, hope: float) -> None:
        """Go on with the best of these that do not end, and keep the best that do.

        hope: what `Candidate.value` is divided by for `Candidate.hoped`.
        """
        beams, first = len(self.rows), self.number * len(self.rows)
        values = [_sum(c.value, _FAR) if end else c.value for c, end in zip(candidates, ends)]
        chosen = _top(values, beams)
        full = self.is_full
        just = ends[:beams] + [False] * (len(candidates) - beams)
        if any(just) or not full:
            self._merge(candidates, just, _FAR * (full and early), first)
        best = candidates[chosen[0]]
        hoped = c_float(values[chosen[0]] / hope).value if ends[chosen[0]] else best.hoped
        self.rows, self.paths, self.scores, self.parents = (
            [self.rows[candidates[i].beam] + [candidates[i].token] for i in chosen],
            [self.paths[candidates[i].beam] + [first + candidates[i].beam] for i in chosen],
            [values[i] for i in chosen],
            [candidates[i].beam for i in chosen],
        )
        worst = min(one.score for one in self.found)
        self.improves &= any(hoped > (worst if one.ended else _FAR) for one in self.found)

    def _merge(
        self, candidates: list[Candidate], just: list[bool], late: float, first: int
    ) -> None:
        """The best of what had ended and what ends now."""
        scores = [one.score for one in self.found]
        for candidate, ended in zip(candidates, just):
            score = candidate.ranked
            for reason in (late, 0.0 if self.improves else _FAR, 0.0 if ended else _FAR):
                score = _sum(score, reason) if reason else score
            scores.append(score)
        kept, beams = [], len(self.found)
        for i in _top(scores, beams):
            if i < beams:
                kept.append(self.found[i])
                continue
            c = candidates[i - beams]
            tokens, path = self.rows[c.beam] + [c.token], self.paths[c.beam] + [first + c.beam]
            kept.append(Sentence(scores[i], tokens, path, just[i - beams]))
        self.found = kept


def _sum(a: float, b: float) -> float:
    """Of two float32."""
    return c_float(a + b).value


def _top(values: list[float], count: int) -> list[int]:
    """The places of the highest, descending."""
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
    if any(values[a] == values[b] for a, b in pairwise(order[: count + 1])):
        found: list[int] = torch.topk(torch.tensor(values), count).indices.tolist()
        return found
    return order[:count]


def search(plan: Plan, ids: Tensor) -> Written:
    """ids int64 [images * beams, L] -> the best sentences of each image."""
    config, device = plan.config, plan.device
    beams, begun = config.num_beams, ids.shape[1]
    given: list[list[int]] = ids.tolist()
    images = [Image(i, given[i * beams : (i + 1) * beams]) for i in range(len(given) // beams)]
    live = images
    rows, bans = given, plan.bans(given)
    width = beams * max(2, 1 + len(_eos(config)))
    early = config.early_stopping is True
    last = plan.steps.begin()
    while True:
        length = len(rows[0]) + 1
        scale = (length - begun) ** config.length_penalty
        hope = scale
        if config.early_stopping == "never" and config.length_penalty > 0.0:
            hope = (config.max_length - begun) ** config.length_penalty
        running = torch.tensor([image.scores for image in live], device=device)
        values, places, vocabulary = _best(plan, last, rows, bans.next(rows), running, width)
        parts = (places, values, values / scale, values / hope)
        table = torch.stack([part.double() for part in parts], 2).tolist()
        all_end = plan.ends.all_end(length, device)
        asked = [
            [
                Candidate(int(place) // vocabulary, int(place) % vocabulary, *numbers)
                for place, *numbers in each
            ]
            for each in table
        ]
        ends = _ends(plan, live, asked, all_end)
        for image, candidates, hits in zip(live, asked, ends):
            image.step(candidates, hits, early, hope)
        goes_on = any(image.improves for image in live) and not all(map(all, ends))
        if not goes_on or (early and all(image.is_full for image in live)):
            plan.steps.move(_order(live, live, beams))  # who gets the cache finds it in order
            break
        stay = live
        if plan.steps.may_leave:
            stay = [one for one in live if not (one.is_full and (early or not one.improves))]
        order = _order(live, stay, beams)
        live = stay
        rows = [row for image in live for row in image.rows]
        plan.steps.move(order)
        bans.grow(order, rows)
        last = plan.steps.next(rows, torch.tensor([row[-1] for row in rows], device=device))
    return _written(plan, images, begun)


def _order(live: list[Image], stay: list[Image], beams: int) -> list[int]:
    """From which of the rows of now the beams of those that stay go on."""
    places = {image.number: place * beams for place, image in enumerate(live)}
    return [places[image.number] + parent for image in stay for parent in image.parents]


def _eos(config: Any) -> list[int]:
    tokens = config._eos_token_tensor
    return [] if tokens is None else tokens.flatten().tolist()


def _best(
    plan: Plan,
    last: Last,
    rows: list[list[int]],
    banned: Banned,
    running: Tensor,
    k: int,
) -> tuple[Tensor, Tensor, int]:
    """The k best continuations of each image: their summed scores [I, k], their places among
    beams times vocabulary, and that vocabulary. running: float32 [I, beams]."""
    images, beams = running.shape
    draws = plan.config.do_sample
    if plan.ranks and not draws and last.rankable(k + banned.most):
        assert last.head is not None
        return *best_of_images(last, running, k, banned), last.head.vocabulary
    scores = torch.nn.functional.log_softmax(plan.logits(last), dim=-1)
    scores = plan.processed(rows, scores, banned)
    width = scores.shape[1]
    scores = (scores.view(images, beams, -1) + running.unsqueeze(2)).view(images, -1)
    if draws:
        chances = torch.nn.functional.softmax(scores, dim=-1)
        places = torch.multinomial(chances, num_samples=k)
        return scores.gather(1, places), places, width
    values, places = torch.topk(scores, k=k)
    return values, places, width


def best_of_images(last: Last, running: Tensor, k: int, banned: Banned) -> tuple[Tensor, Tensor]:
    """The k best continuations of each image without the scores of others: their summed scores and
    places, [images, k]. running: float32 [images, beams]."""
    assert last.head is not None
    (images, beams), width = running.shape, last.head.vocabulary
    values, tokens = best_of_rows(last, k, banned)
    values = (values.view(images, beams, -1) + running.unsqueeze(2)).view(images, -1)
    first = torch.arange(0, beams * width, width, device=tokens.device).unsqueeze(1)
    tokens = (tokens.view(images, beams, -1) + first).view(images, -1)
    # stable: of equal values the lower place
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], tokens.gather(1, order[:, :k])


def _ends(
    plan: Plan, live: list[Image], asked: list[list[Candidate]], all_end: bool
) -> list[list[bool]]:
    """Whether each candidate ends its sentence."""
    eos = plan.ends.eos
    found = [[all_end or c.token in eos for c in candidates] for candidates in asked]
    if plan.ends.others:
        whole = [image.rows[c.beam] + [c.token] for image, each in zip(live, asked) for c in each]
        ended = iter(plan.ends.of_rows(whole, plan.device))
        found = [[end | next(ended) for end in each] for each in found]
    return found


def _written(plan: Plan, images: list[Image], begun: int) -> Written:
    config, device = plan.config, plan.device
    best = [one for image in images for one in image.found[: config.num_return_sequences]]
    length = max(len(one.beams) for one in best)
    fill = _filler(config)
    tokens = [one.tokens + [fill] * (begun + length - len(one.tokens)) for one in best]
    beams = [one.beams + [-1] * (length - len(one.beams)) for one in best]
    return Written(
        torch.tensor(tokens, device=device),
        torch.tensor([one.score for one in best], dtype=torch.float32, device=device),
        torch.tensor(beams, dtype=torch.int32, device=device).view(len(best), length),
    )


def _filler(config: Any) -> int:
    """What stands behind the end of a sentence: a pad token of 0 counts as none."""
    eos, pad = _eos(config), config._pad_token_tensor
    if not eos:
        return -1
    return int(pad) if pad is not None and int(pad) else eos[0]
