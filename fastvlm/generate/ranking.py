"""The best continuations of searches, by all scores of their rows or by the best of the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvlm.generate.bans import Banned
from fastvlm.generate.head import Last, best_lists_of_rows, best_of_rows
from fastvlm.generate.plan import Plan
from fastvlm.generate.searches import Candidate, descending, float32, over


def continuations(
    plan: Plan,
    last: Last,
    searches: Sequence[Any],
    banned: Banned,
    scales: list[float],
    hopes: list[float],
) -> list[list[Candidate]]:
    """The best continuations of each search. scales, hopes: what `Candidate.value` of each is
    divided by for `Candidate.ranked` and `Candidate.hoped`."""
    scores = [one.scores for one in searches]
    if _on_host(plan.device) and _ranks(plan, last, banned):
        found = best_in_python(last, scores, _count(plan, len(scores[0])), banned)
        return [_judged(*each) for each in zip(found, scales, hopes)]
    rows = [row for one in searches for row in one.rows]
    running = torch.tensor(scores, device=plan.device)
    values, places, vocabulary = best(plan, last, rows, banned, running)
    parts = (places, values, values / _column(scales, values), values / _column(hopes, values))
    table: list[list[list[float]]] = torch.stack([p.double() for p in parts], 2).tolist()
    return [
        [Candidate(int(p) // vocabulary, int(p) % vocabulary, *numbers) for p, *numbers in one]
        for one in table
    ]


def _on_host(device: torch.device) -> bool:
    """Whether to rank in Python: a handful of numbers, for which PyTorch's calls take longer. From
    another device they would come in two transfers, and sums and quotients may round otherwise."""
    return device.type == "cpu"


def _count(plan: Plan, beams: int) -> int:
    """How many of the best continuations of a search of so many beams are looked at."""
    return beams * max(2, 1 + len(plan.eos))


def _ranks(plan: Plan, last: Last, banned: Banned) -> bool:
    """Whether beams are ranked by the best of the head."""
    config = plan.config
    if not plan.ranks or config.do_sample or config.num_beams == 1:
        return False
    return last.rankable(_count(plan, config.num_beams) + banned.most)


def _judged(found: list[tuple[int, int, float]], scale: float, hope: float) -> list[Candidate]:
    """found: beams, tokens and summed scores."""
    values = [value for _, _, value in found]
    ranked, hoped = over(values, scale), over(values, hope)
    return [Candidate(*one, r, h) for one, r, h in zip(found, ranked, hoped)]


def _column(numbers: list[float], like: Tensor) -> float | Tensor:
    """To divide rows by: a number where it is the same for all, as in transformers' loop."""
    if len(set(numbers)) == 1:
        return numbers[0]
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).unsqueeze(1)


def best(
    plan: Plan, last: Last, rows: list[list[int]], banned: Banned, running: Tensor
) -> tuple[Tensor, Tensor, int]:
    """The k best continuations of each search: their scores [S, k], their places among beams times
    vocabulary, and that vocabulary.

    running: float32 [S, beams], to which the tokens' scores are added. Of one beam, which is
    greedy, the best alone, and its own log-probability.
    """
    searches, beams = running.shape
    if plan.config.num_beams == 1:
        return greedy(plan, last, rows, banned)
    k = _count(plan, beams)
    draws = plan.config.do_sample
    if _ranks(plan, last, banned):
        assert last.head is not None
        return *best_of_images(last, running, k, banned), last.head.vocabulary
    scores = torch.nn.functional.log_softmax(plan.logits(last), dim=-1)
    scores = plan.processed(rows, scores, banned)
    width = scores.shape[1]
    scores = (scores.view(searches, beams, -1) + running.unsqueeze(2)).view(searches, -1)
    if draws:
        chances = torch.nn.functional.softmax(scores, dim=-1)
        places = torch.multinomial(chances, num_samples=k)
        return scores.gather(1, places), places, width
    values, places = torch.topk(scores, k=k)
    return values, places, width


def greedy(
    plan: Plan, last: Last, rows: list[list[int]], banned: Banned
) -> tuple[Tensor, Tensor, int]:
    """The best token of each row and its log-probability among those that may come, [R, 1]."""
    scores = plan.processed(rows, plan.logits(last), banned)
    tokens = torch.argmax(scores, dim=-1, keepdim=True)
    return scores.gather(1, tokens) - scores.logsumexp(1, True), tokens, scores.shape[1]


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


def best_in_python(
    last: Last, running: list[list[float]], k: int, banned: Banned
) -> list[list[tuple[int, int, float]]]:
    """`best_of_images`, of each image the beam, token and summed score of its k best."""
    values, tokens = best_lists_of_rows(last, k, banned)
    beams, found = len(running[0]), []
    for image, scores in enumerate(running):
        rows = slice(image * beams, (image + 1) * beams)
        sums = float32([s + value for s, row in zip(scores, values[rows]) for value in row])
        theirs = [(beam, token) for beam, row in enumerate(tokens[rows]) for token in row]
        found.append([(*theirs[place], sums[place]) for place in descending(sums)[:k]])
    return found
