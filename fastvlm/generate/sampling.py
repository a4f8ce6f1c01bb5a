"""Greedy decoding and sampling: the tokens of transformers' loop; rows that have ended leave.

A draw is made for all rows that ever were, so that a seed gives the same tokens whoever has left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm.generate.bans import Banned
from fastvlm.generate.head import Last, best_token_of_rows
from fastvlm.generate.plan import Plan, Written


def sample(plan: Plan, ids: Tensor) -> Written:
    """ids int64 [R, L] -> the same with what follows."""
    rows: list[list[int]] = ids.tolist()
    count, begun = len(rows), ids.shape[1]
    pad = plan.config._pad_token_tensor
    filler = int(pad) if plan.ends.fills and pad is not None else 0
    written = [list(row) for row in rows]
    live = list(range(count))  # of the rows that still are, their numbers
    ended = [False] * count  # by number
    bans = plan.bans(rows)
    last = plan.steps.begin(ids)
    while True:
        taken = _choose(plan, last, rows, bans.next(rows), live, count)
        if plan.ends.fills:
            for place, number in enumerate(live):
                if ended[number]:
                    taken[place] = filler
        for row, token in zip(rows, taken):
            row.append(token)
        all_end = plan.ends.all_end(len(rows[0]), plan.device)
        by_others = plan.ends.of_rows(rows, plan.device)
        for place, number in enumerate(live):
            written[number] = rows[place]
            if all_end or taken[place] in plan.ends.eos or by_others[place]:
                ended[number] = True
        if all(ended):
            break
        bans.grow(None, rows)
        stay = [place for place, number in enumerate(live) if not ended[number]]
        # without an end token transformers' rows write on behind their end
        if len(stay) < len(live) and plan.ends.fills and plan.steps.may_leave:
            plan.steps.move(stay)
            bans.keep(stay)
            rows, live = [rows[i] for i in stay], [live[i] for i in stay]
            taken = [taken[i] for i in stay]
        last = plan.steps.next(rows, torch.tensor(taken, device=plan.device))
    length = max(map(len, written))
    full = [row + [filler] * (length - len(row)) for row in written]
    assert length > begun
    return Written(torch.tensor(full, device=plan.device))


def _choose(
    plan: Plan, last: Last, rows: list[list[int]], banned: Banned, live: list[int], count: int
) -> list[int]:
    """The next token of each row that is left."""
    draws = plan.config.do_sample
    ranks = plan.ranks and not draws and plan.notes is None
    if ranks and last.rankable(1 + banned.most):
        return best_token_of_rows(last, banned)
    scores = plan.processed(rows, plan.logits(last), banned)
    tokens = _drawn(scores, live, count) if draws else torch.argmax(scores, dim=-1)
    if plan.notes is not None:
        taken = scores.gather(1, tokens.unsqueeze(1)).squeeze(1) - scores.logsumexp(1)
        everyone = taken.new_full((count,), float("nan"))
        everyone[torch.tensor(live, device=taken.device)] = taken
        plan.notes.note(everyone)
    found: list[int] = tokens.tolist()
    return found


def _drawn(scores: Tensor, live: list[int], count: int) -> Tensor:
    """One token of each row by its scores [R, V], as if all count rows were still there."""
    chances = torch.nn.functional.softmax(scores, dim=-1)
    if len(live) == count:
        return torch.multinomial(chances, num_samples=1).squeeze(1)
    index = torch.tensor(live, device=scores.device)
    everyone = torch.ones(count, chances.shape[1], device=scores.device, dtype=chances.dtype)
    everyone.index_copy_(0, index, chances)
    return torch.multinomial(everyone, num_samples=1).squeeze(1)[index]
