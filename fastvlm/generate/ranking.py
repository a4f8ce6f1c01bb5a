"""The best continuations of searches, by all scores of their rows or by the best of the head."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm.generate.bans import Banned
from fastvlm.generate.head import Last, best_of_rows
from fastvlm.generate.plan import Plan


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
    k = beams * max(2, 1 + len(plan.eos))
    draws = plan.config.do_sample
    if plan.ranks and not draws and last.rankable(k + banned.most):
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
