"""Scores of a decoding step from which only the best are wanted: `fastvlm.ops.linear_topk`.

transformers' loops take the logits of the last position to float32, to log-probabilities, through
logits processors, add the scores of the beams and ask for the best. `RankedLogits` and
`RankedScores` keep that in mind and compute when the best are asked for. Whatever else is done with
them computes the scores of all tokens first, and goes on with those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm import ops
from fastvlm.compat import hf
from fastvlm.patching.lazy_tensor import LazyTensor, materialize
from fastvlm.patching.logits import LazyLogits

# the longest ranking that every kernel serves; a longer one is hardly shorter than the logits
MOST_RANKED = 64


def _unless_computed(name: str) -> Callable[..., Any]:
    lazily = getattr(LazyLogits, name)

    def call(self: RankedLogits, *args: Any, **kwargs: Any) -> Any:
        if self.computed:
            return getattr(self.computed[0], name)(*args, **kwargs)
        return lazily(self, *args, **kwargs)

    return call


@dataclass(frozen=True, eq=False)
class RankedLogits(LazyLogits):
    """The logits of a forward that a decoding loop called. kept: what all its steps share.

    Once computed they are what was computed: a model that writes into its logits finds that again.
    """

    kept: dict[Any, Tensor] = field(default_factory=dict)
    computed: list[Tensor] = field(default_factory=list, init=False)

    def tensor(self) -> Tensor:
        if not self.computed:
            self.computed.append(super().tensor())
        return self.computed[0]

    float = _unless_computed("float")
    contiguous = _unless_computed("contiguous")
    view = _unless_computed("view")
    reshape = _unless_computed("reshape")
    tanh = _unless_computed("tanh")
    __add__ = _unless_computed("__add__")
    __truediv__ = _unless_computed("__truediv__")
    __mul__ = _unless_computed("__mul__")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if self.computed:
            return self.computed[0].to(*args, **kwargs)
        last = self.ndim == 2 and self.divided is None
        if not (last and hf.is_cast_of_last_logits(args, kwargs, self.device)):
            return super().to(*args, **kwargs)
        return RankedScores(self, self.shape)

    def __getitem__(self, index: Any) -> Any:
        everything = slice(None)
        last = index in ((everything, -1), (everything, -1, everything))
        if self.computed or self.ndim != 3 or not last:
            return self.tensor()[index]
        return replace(self, h=self.h[:, -1], packed=None)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tensor()[index] = value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(isinstance(arg, cls) and arg.computed for arg in args):
            args = [materialize(arg) for arg in args]
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@dataclass(frozen=True, eq=False)
class RankedScores(LazyTensor):
    """float32 scores of every token, of which the best can be had without the others.

    logits: [R, V]. shape: (R, V), (images, R / images, V), or (images, R / images * V).
    normal: log-probabilities. banned: int64 [R or 1, n] each, tokens at -inf; -1 is none. left_out:
    how many of a row's tokens they are at most. forced: int64 [n], the tokens at 0, all others
    at -inf. added: float32 [images, R / images, 1].
    """

    logits: RankedLogits
    shape: torch.Size
    normal: bool = False
    banned: tuple[Tensor, ...] = ()
    left_out: int = 0
    forced: Tensor | None = None
    added: Tensor | None = None

    def banning(self, tokens: Tensor, most: int) -> RankedScores:
        """These with the tokens [R or 1, n] at -inf, up to most of them in a row."""
        return replace(self, banned=(*self.banned, tokens), left_out=self.left_out + most)

    def forcing(self, tokens: Tensor) -> RankedScores:
        """These with the tokens [n] at 0 and all others at -inf, whatever was banned."""
        return replace(self, forced=tokens, banned=(), left_out=0)

    def best(self, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices [shape[0], k], descending; of equal values the lower index."""
        rows, vocabulary = self.logits.shape
        values, tokens = self._candidates(min(vocabulary, k + self.left_out))
        for banned in self.banned:
            found = (tokens.unsqueeze(2) == banned.unsqueeze(1)).any(2)
            values = values.masked_fill(found, float("-inf"))
        images = self.shape[0]
        beams = rows // images
        if self.added is not None:
            values = (values.view(images, beams, -1) + self.added).view(rows, -1)
        if beams > 1:
            tokens = (tokens.view(images, beams, -1) + self._first_of(beams)).view(images, -1)
            values = values.view(images, -1)
        if beams > 1 or self.banned:
            values, order = values.sort(dim=1, descending=True, stable=True)
            tokens = tokens.gather(1, order[:, :k])
        return values[:, :k], tokens[:, :k]

    def _first_of(self, beams: int) -> Tensor:
        """Where the tokens of each beam begin among those of all, [beams, 1]."""
        kept, vocabulary = self.logits.kept, self.logits.shape[1]
        if beams not in kept:
            first = torch.arange(0, beams * vocabulary, vocabulary, device=self.device)
            kept[beams] = first.unsqueeze(1)
        return kept[beams]

    def _candidates(self, k: int) -> tuple[Tensor, Tensor]:
        """The best k of each row, before bans and beams: values and tokens [R, k]."""
        logits = self.logits
        if self.forced is not None:
            rows, taken = logits.shape[0], self.forced.sort().values
            others = torch.arange(max(0, k - taken.numel()), device=taken.device)
            tokens = torch.cat((taken, others)).expand(rows, -1)
            values = torch.zeros(tokens.shape, device=logits.device)
            values[:, taken.numel() :] = float("-inf")
            return values, tokens
        with logits.state.restored(logits.device.type):
            values, tokens, total = ops.linear_topk(
                logits.h, logits.weight, k, bias=logits.bias, softcap=logits.softcap
            )
        return values if self.normal else values + total.unsqueeze(1), tokens

    def tensor(self) -> Tensor:
        """All of them."""
        rows, vocabulary = self.logits.shape
        if self.forced is not None:
            scores = torch.full((rows, vocabulary), float("-inf"), device=self.device)
            scores[:, self.forced] = 0
        else:
            scores = self.logits.tensor().to(torch.float32, copy=True)
            scores = scores.log_softmax(-1) if self.normal else scores
        for banned in self.banned:
            outside = (banned < 0) | (banned >= vocabulary)
            mask = torch.zeros(rows, vocabulary + 1, dtype=torch.bool, device=self.device)
            mask.scatter_(1, banned.masked_fill(outside, vocabulary).expand(rows, -1), True)
            scores.masked_fill_(mask[:, :vocabulary], float("-inf"))
        if self.added is not None:
            scores = scores.view(*self.added.shape[:2], vocabulary) + self.added
        return scores.view(self.shape)

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def clone(self) -> RankedScores:
        return replace(self)

    def forget(self) -> None:
        """Let go of what these scores would be made from; nobody may ask for them any more."""
        object.__setattr__(self, "logits", None)

    def __add__(self, other: Any) -> Any:
        a_beam = isinstance(other, Tensor) and other.dtype == torch.float32
        if a_beam and self.ndim == 3 and other.shape == (*self.shape[:2], 1) and self.added is None:
            return replace(self, added=other)
        return self.tensor() + other

    def _reshaped(self, shape: Any) -> RankedScores | None:
        (rows, vocabulary), sizes = self.logits.shape, tuple(shape)
        beams = len(sizes) == 3 and sizes[0] * sizes[1] == rows and sizes[2] == vocabulary
        if beams and self.shape == self.logits.shape:
            return replace(self, shape=torch.Size(sizes))
        if self.ndim == 3 and sizes == (self.shape[0], -1):
            return replace(self, shape=torch.Size((sizes[0], self.shape[1] * vocabulary)))
        return None

    def _answer(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """What func gives of these; None where all scores are needed for that."""
        if func is torch.reshape and len(args) == 1 and not kwargs:
            return self._reshaped(args[0])
        if self.ndim != 2 or args:
            return None
        if func is F.log_softmax and not (self.normal or self.banned or self.forced is not None):
            plain = kwargs.get("dim") == -1 and kwargs.get("dtype") is None
            return replace(self, normal=True) if plain else None
        if func is torch.argmax and kwargs == {"dim": -1} and self.left_out < MOST_RANKED:
            return self.best(1)[1].squeeze(1)
        if func is torch.topk and kwargs.keys() == {"k"}:
            k = kwargs["k"]
            if k + self.left_out <= MOST_RANKED and k <= self.logits.shape[1]:
                return torch.return_types.topk(self.best(k))
        return None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], cls):
            found = args[0]._answer(func, args[1:], kwargs)
            if found is not None:
                return found
        return super().__torch_function__(func, types, args, kwargs)
