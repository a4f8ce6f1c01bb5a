"""What the ops of the CUDA library launch, on tensors without memory.

The launchers of fastvlm/cuda run as they are; what they call, the ops of csrc/bind_cuda, is
compiled by nvcc and asks for memory. Here stands for each what it launches, with which tensors; the
tests compare the number of launches with that of the library itself in the emulator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# kTileTokens of csrc/cuda/loss.h
TILE_TOKENS = 64


def _wide(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


class CudaLaunches:
    """The namespace torch.ops.fastvlm_cuda; traffic gets the launches."""

    def __init__(self, traffic: Any) -> None:
        self.traffic = traffic

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with mock.patch.object(torch.ops, "fastvlm_cuda", self, create=True):
            yield

    def _launch(self, name: str, *tensors: Tensor | None) -> None:
        self.traffic.add(f"fastvlm.cuda.{name}", [x for x in tensors if x is not None])

    def _attention(self, name: str, q: Tensor, splits: int, *read: Tensor | None) -> Any:
        out, stats = torch.empty_like(q), _wide(q, *q.shape[:2], 2)
        kept = stats if name == "cross_attention" else None
        # the last block of a tile reads what all of them have written
        parts = () if splits == 1 else (_wide(q, splits, *q.shape), _wide(q, splits, *stats.shape))
        self._launch(name, q, *read, *parts, *parts, out, kept)
        return out, stats

    def cross_attention(
        self, q: Tensor, k: Tensor, v: Tensor, kv_offsets: Tensor, reader_offsets: Tensor,
        rows_by_image: Tensor | None, max_readers: int, inner: float, outer: float, capped: bool,
        splits: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        where = kv_offsets, reader_offsets, rows_by_image
        out: tuple[Tensor, Tensor] = self._attention("cross_attention", q, splits, k, v, *where)
        return out

    def cached_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor,
        ancestry: Tensor | None, window: int, inner: float, outer: float, capped: bool, splits: int,
    ) -> Tensor:  # fmt: skip
        out: Tensor = self._attention(
            "cached_attention", q, splits, k_cache, v_cache, lengths, ancestry
        )[0]
        return out

    def few_rows_linear(
        self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
        activation: int, splits: int,
    ) -> Tensor:  # fmt: skip
        return self._product("few_rows_linear", x, splits, weight, scale, bias)

    def few_rows_gated(
        self, x: Tensor, gate: Tensor, up: Tensor, gate_scale: Tensor | None,
        up_scale: Tensor | None, activation: int, splits: int,
    ) -> Tensor:  # fmt: skip
        return self._product("few_rows_gated", x, splits, gate, up, gate_scale, up_scale)

    def _product(self, name: str, x: Tensor, splits: int, *read: Tensor | None) -> Tensor:
        shape = x.shape[0], read[0].shape[0]
        out, weights = x.new_empty(shape), 2 if name == "few_rows_gated" else 1
        # the last block of some columns reads what all of them have written
        parts = () if splits == 1 else (_wide(x, splits, weights, *shape),)
        self._launch(name, x, *read, *parts, *parts, out)
        return out

    def linear_topk(
        self, h: Tensor, weight: Tensor, k: int, bias: Tensor | None, softcap: float, tiles: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, blocks = h.shape[0], -(-weight.shape[0] // (TILE_TOKENS * tiles))
        kept = min(k, TILE_TOKENS)
        keys = h.new_empty((rows, blocks, kept), dtype=torch.int64)
        parts = _wide(h, rows, blocks), _wide(h, rows, blocks), keys
        indices = h.new_empty((rows, k), dtype=torch.int64)
        found = _wide(h, rows, k), indices, _wide(h, rows)
        self._launch("topk_tiles", h, weight, bias, *parts)
        self._launch("topk_merge", *parts, *found)
        return found

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        out = torch.empty_like(x)
        self._launch("rms_norm", x, weight, out)
        return out

    def residual_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, gate: Tensor | None,
        next_weight: Tensor | None, eps: float, offset: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        h = torch.empty_like(x)
        y = x.new_empty(0 if next_weight is None else x.shape)
        self._launch("residual_rms_norm", x, residual, weight, gate, next_weight, h, y)
        return h, y

    def residual_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None,
        eps: float, dropout_p: float,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(x)
        self._launch("residual_layer_norm", x, residual, weight, bias, seed, out)
        return out
