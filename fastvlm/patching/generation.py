"""generate() of a patched model asks its head for the best tokens alone, where they are enough.

transformers' own loops run; while they do, the head of their model gives `RankedLogits`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.compat import hf, pytorch
from fastvlm.compat.versions import attention_refused
from fastvlm.nn.linear import is_plain
from fastvlm.patching.logits import show_lazily
from fastvlm.run.mixin import Mixin

# rows of 16 bits up to which the CPU's ranking streams the weight (MAX_ROWS of
# fastvlm/cpu/gemm.py); with more it begins with a float32 copy, and takes 2.5 times as long
_FEW_16_BIT_ROWS = 64
# criteria that look at tokens alone
_LOOK_AT_TOKENS = ("MaxLengthCriteria", "MaxTimeCriteria", "EosTokenCriteria", "StopStringCriteria")


@dataclass
class Ranking:
    """A decoding loop. runs: its model's forward is running. kept: what all its steps share."""

    model: nn.Module
    head: nn.Module
    runs: bool = False
    kept: dict[Any, Tensor] = field(default_factory=dict)


# of the loop that runs in this thread
_RANKING: ContextVar[Ranking | None] = ContextVar("fastvlm_ranking", default=None)


def ranking_for(head: nn.Module) -> Ranking | None:
    """The loop whose model calls this head, where it ranks."""
    ranking = _RANKING.get()
    return ranking if ranking is not None and ranking.runs and ranking.head is head else None


@contextmanager
def forward_of(model: nn.Module) -> Iterator[bool]:
    """A forward of model; whether its logits are to be ranked."""
    ranking = _RANKING.get()
    if ranking is None or ranking.model is not model or ranking.runs:
        yield False
        return
    ranking.runs = True
    try:
        yield True
    finally:
        ranking.runs = False


class RankedGeneration(Mixin):
    """A model whose decoding loops need no logits where nobody looks at them."""

    def _sample(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
        generation_config: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        why = self._needs_logits(
            input_ids, logits_processor, stopping_criteria, generation_config, "_sample"
        )
        with self._ranking(why, logits_processor) as processors:
            return super()._sample(  # type: ignore[misc]
                input_ids, processors, stopping_criteria, generation_config, **kwargs
            )

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        if attention_refused() is not None:  # before 5 some versions hand over a scorer of beams
            return super()._beam_search(*args, **kwargs)  # type: ignore[misc]
        return self._ranked_beam_search(*args, **kwargs)

    def _ranked_beam_search(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
        generation_config: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        why = self._needs_logits(
            input_ids, logits_processor, stopping_criteria, generation_config, "_beam_search"
        )
        with self._ranking(why, logits_processor) as processors:
            return super()._beam_search(  # type: ignore[misc]
                input_ids, processors, stopping_criteria, generation_config, **kwargs
            )

    @contextmanager
    def _ranking(self, why: str | None, processors: Any) -> Iterator[Any]:
        from fastvlm.patching.processors import RankedProcessors

        ranking = None
        if why is None:
            ranking = Ranking(self, self.get_output_embeddings())
            processors = RankedProcessors(processors)
        token = _RANKING.set(ranking)
        try:
            yield processors
        finally:
            _RANKING.reset(token)

    def _needs_logits(
        self, input_ids: Tensor, processors: Any, criteria: Any, config: Any, loop: str
    ) -> str | None:
        """Why this call of a loop must have all logits; None where it need not."""
        from fastvlm.patching.processors import unknown

        if (old := attention_refused()) is not None:
            return old
        if not hf.is_own_loop(getattr(super(), loop), loop):
            return "its decoding loop is not transformers'"
        if config.do_sample:
            return "it draws from all tokens"
        asked = config.output_logits or (config.output_scores and not _emptied(criteria))
        if config.return_dict_in_generate and asked:
            return "its scores are asked for"
        if (name := unknown(processors)) is not None:
            return f"{name} looks at them"
        if torch.is_grad_enabled():
            return "gradients are on"
        return self._head_needs_logits(input_ids.shape[0], loop)

    def _head_needs_logits(self, rows: int, loop: str) -> str | None:
        head = self.get_output_embeddings()
        around = getattr(self, "lm_head", head)  # T5Gemma's holds the head
        if not getattr(head, "gives_lazy_logits", False) or not is_plain(head):
            return "its head is no plain nn.Linear"
        if around is not head and _is_hooked(around):
            return "there is a hook around its head"
        weight = head.weight
        if weight.shape != (head.out_features, head.in_features):
            return "its head is sharded"
        if weight.dtype == torch.float64:
            return "no kernel ranks in float64"
        return _slower(weight, rows, loop)

    def _update_model_kwargs_for_generation(self, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        ranking = _RANKING.get()
        if ranking is not None and ranking.model is self:
            show_lazily(outputs)  # this is the loop; anybody else who looks gets a tensor
        update: Any = super()._update_model_kwargs_for_generation  # type: ignore[misc]
        return update(outputs, *args, **kwargs)


def _slower(weight: Tensor, rows: int, loop: str) -> str | None:
    """Why logits are faster here, as measured; None where they are not."""
    if weight.device.type != "cpu":
        return None
    if loop == "_sample":
        # the largest logit needs no normalisation: the ranking has 0.9 to 1.1 times the speed
        return "on a CPU the largest of a row is found as soon in its logits"
    if weight.dtype.itemsize < 4 and rows > _FEW_16_BIT_ROWS:
        return "on a CPU many rows of 16 bits are ranked more slowly"
    return None


def _emptied(criteria: Any) -> bool:
    """Whether the scores of each step are emptied before anybody looks (`fastvlm.caption`)."""
    *others, last = criteria
    seen = [c for c in others if type(c).__name__ not in _LOOK_AT_TOKENS]
    return not seen and getattr(last, "empties_unseen", False)


def _is_hooked(module: nn.Module) -> bool:
    return "forward" in vars(module) or pytorch.has_hooks(module, backward=False)
