"""Logits processors of transformers that change few tokens: what they do, told without scores.

Each bans some tokens (sets them to -inf) or forces some (sets them to 0 and all others to -inf).
The best of what a ban leaves are among as many more of the best as tokens are banned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import generation
from transformers.generation.logits_process import LogitsProcessorList

from fastvlm.patching.ranked import MOST_RANKED, RankedScores


def _row(tokens: Any, scores: RankedScores) -> Tensor:
    return torch.as_tensor(tokens, device=scores.device).flatten()


def _ban(scores: RankedScores, tokens: Tensor) -> RankedScores:
    return scores.banning(_row(tokens, scores).unsqueeze(0), tokens.numel())


def _min_length(processor: Any, ids: Tensor, scores: RankedScores) -> RankedScores:
    short = ids.shape[-1] < processor.min_length
    return _ban(scores, processor.eos_token_id) if short else scores


def _min_new_tokens(processor: Any, ids: Tensor, scores: RankedScores) -> RankedScores:
    short = ids.shape[-1] - processor.prompt_length_to_skip < processor.min_new_tokens
    return _ban(scores, processor.eos_token_id) if short else scores


def _suppress(processor: Any, ids: Tensor, scores: RankedScores) -> RankedScores:
    return _ban(scores, processor.suppress_tokens)


def _suppress_at_begin(processor: Any, ids: Tensor, scores: RankedScores) -> RankedScores:
    begins = ids.shape[-1] == processor.begin_index
    return _ban(scores, processor.begin_suppress_tokens) if begins else scores


def _force_bos(processor: Any, ids: Tensor, scores: RankedScores) -> RankedScores:
    return scores.forcing(_row(processor.bos_token_id, scores)) if ids.shape[-1] == 1 else scores


def _force_eos(processor: Any, ids: Tensor, scores: RankedScores) -> RankedScores:
    ends = ids.shape[-1] == processor.max_length - 1
    return scores.forcing(_row(processor.eos_token_id, scores)) if ends else scores


def _no_repeat(processor: Any, ids: Tensor, scores: RankedScores) -> RankedScores:
    """Every token that followed an earlier occurrence of a row's last n - 1 tokens."""
    n, length = processor.ngram_size, ids.shape[-1]
    if length < n:
        return scores
    followers = ids[:, n - 1 :]
    occurs = torch.ones_like(followers, dtype=torch.bool)
    for place in range(n - 1):
        here = ids[:, place : place + followers.shape[1]]
        occurs &= here == ids[:, length - n + 1 + place].unsqueeze(1)
    # waits for the device, as the loop itself does in every step: nearly always there is none, and
    # a ranking for the worst case would be longer than the logits
    most = int(occurs.sum(1).max())
    return scores.banning(followers.masked_fill(~occurs, -1), most) if most else scores


_Apply = Callable[[Any, Tensor, RankedScores], RankedScores]
APPLY: dict[type, _Apply] = {
    generation.MinLengthLogitsProcessor: _min_length,
    generation.MinNewTokensLengthLogitsProcessor: _min_new_tokens,
    generation.SuppressTokensLogitsProcessor: _suppress,
    generation.SuppressTokensAtBeginLogitsProcessor: _suppress_at_begin,
    generation.ForcedBOSTokenLogitsProcessor: _force_bos,
    generation.ForcedEOSTokenLogitsProcessor: _force_eos,
    generation.NoRepeatNGramLogitsProcessor: _no_repeat,
}


class RankedProcessors(LogitsProcessorList):
    """Processors of these classes, and no others; for scores that are no ranking, what they are."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if not isinstance(scores, RankedScores):
            return super().__call__(input_ids, scores, **kwargs)
        ranked = scores
        for processor in self:
            ranked = APPLY[type(processor)](processor, input_ids, ranked)
        if ranked.left_out >= MOST_RANKED:
            return super().__call__(input_ids, scores.tensor(), **kwargs)
        return ranked


def unknown(processors: LogitsProcessorList) -> str | None:
    """The name of a processor that must see the scores; None where there is none."""
    return next((type(p).__name__ for p in processors if type(p) not in APPLY), None)
