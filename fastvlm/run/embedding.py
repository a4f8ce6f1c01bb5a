"""What a decoding step begins with: the new token of each row, embedded by the stack's spec."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm.compat import hf
from fastvlm.decoding.prefixes import only_counts, starts_of
from fastvlm.models.embedding import factor_of, own_row, with_own_row
from fastvlm.models.spec import Embedding
from fastvlm.models.structure import part_of
from fastvlm.nn.linear import is_plain
from fastvlm.run.program import ensure, has_no_hooks


def check_embedding(stack: Any) -> None:
    """NotCompilable where modules must be called to embed a token."""
    spec: Embedding = stack.spec.embedding
    tokens = part_of(stack, spec.tokens)
    ensure(has_no_hooks(tokens) and factor_of(tokens) is not None)
    if spec.holder is not None:
        ensure(has_no_hooks(*getattr(stack, spec.holder).modules()))
    if spec.positions is not None:
        positions = part_of(stack, spec.positions)
        if spec.given:
            ensure(isinstance(positions, nn.Embedding) and has_no_hooks(positions))
        elif spec.counts_tokens:
            ensure(has_no_hooks(positions))
        else:
            ensure(isinstance(_offset(positions, spec), int) and only_counts(positions))
    if spec.factor is not None:
        ensure(isinstance(getattr(stack, spec.factor), (int, float)))
    if spec.norm is not None:
        norm = part_of(stack, spec.norm)
        ensure(has_no_hooks(norm) and is_plain(norm, nn.LayerNorm) and norm.bias is not None)


def _offset(positions: Any, spec: Embedding) -> Any:
    """The row of a table that the first column gets."""
    return 0 if spec.offset is None else getattr(positions, spec.offset, None)


class StepEmbedding:
    """What embeds the new tokens of a stack, its parts looked up once."""

    def __init__(self, stack: Any) -> None:
        self._stack = stack
        spec: Embedding = stack.spec.embedding
        self._spec = spec
        self._tokens = tokens = part_of(stack, spec.tokens)
        self._own, self._factor = own_row(tokens), factor_of(tokens)
        self._positions: Any = spec.positions and part_of(stack, spec.positions)
        self._norm: Any = spec.norm and part_of(stack, spec.norm)

    def __call__(
        self, ids: Tensor, filled: int, position_ids: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """ids [R, 1] at position filled -> [R, d]; less where a row starts if it is padded.

        position_ids: [1 or R, 1], for a stack that goes by them. starts: int64 [R], where that is
        known already.
        """
        spec, stack = self._spec, self._stack
        x = torch.embedding(self._tokens.weight, ids[:, 0])
        if self._factor is not None and self._factor != 1:
            x = x * self._factor
        if self._own is not None:
            x = with_own_row(self._tokens, ids[:, 0], x)
        if spec.scaled:
            x = x * torch.tensor(stack.config.hidden_size**0.5, dtype=x.dtype)
        if spec.factor is not None:
            x = x * getattr(stack, spec.factor)
        if spec.types is not None:
            x = x + part_of(stack, spec.types).weight[0]
        if spec.norm_first:
            x = self._normalized(x)
        if spec.counts_tokens:
            x = x + self._positions(ids, **{hf.length_argument(): filled})[:, 0]
        elif self._positions is not None:
            x = x + self._positions.weight[self._places(ids, filled, position_ids, starts)]
        return x if spec.norm_first else self._normalized(x)

    def _normalized(self, x: Tensor) -> Tensor:
        norm = self._norm
        if norm is None:
            return x
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def _places(
        self, ids: Tensor, filled: int, position_ids: Tensor | None, starts: Tensor | None
    ) -> int | Tensor:
        """Which rows of a table of positions the new tokens get: an index, or one for each."""
        spec = self._spec
        if spec.given and position_ids is not None:
            return position_ids[:, 0]
        if spec.skips is not None:
            pad: int = part_of(self._stack, spec.skips)
            return torch.where(ids[:, 0] != pad, filled + 1, 0) + pad
        if spec.given:
            return filled if starts is None else filled - starts
        at: int = filled + _offset(self._positions, spec)
        starts = starts_of(self._positions, ids.shape[0]) if starts is None else starts
        return at if starts is None else at - starts


def rotation_of(stack: Any, x: Tensor, position_ids: Tensor | None, filled: int) -> Any:
    """cos and sin [R, head_dim] of the new tokens x [R, d], for each way to turn; () for a stack
    without RoPE."""
    if stack.spec.rotary is None:
        return ()
    if position_ids is None:
        position_ids = torch.full((1, 1), filled, device=x.device)
    rotary: Any = getattr(stack, stack.spec.rotary)
    ways: list[tuple[Any, ...]] = [(way,) for way in ways_to_turn(stack)] or [()]
    tables = [t for way in ways for t in rotary(x.unsqueeze(1), position_ids, *way)]
    return tuple(t[:, 0].expand(x.shape[0], -1) for t in tables)


def ways_to_turn(stack: Any) -> list[str]:
    """The kinds of layers that have cosines and sines of their own, in order; none where all have
    the same."""
    return sorted(set(stack.config.layer_types)) if stack.spec.ways else []
