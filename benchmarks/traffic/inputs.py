"""What a layer is counted on: a batch padded, as transformers takes it, and the same one packed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from benchmarks.cases import Decoder
from benchmarks.traffic.counter import DEVICE
from fastvlm import Layout

ENCODER_WIDTH = 1024  # of Florence-2-large, whose states the Gemma decoders read


@dataclass
class Padded:
    """Training: h [B, L, d], states [B, E, de], masks [B, 1, L, L] and [B, 1, L, E]. Decoding: h
    [rows, 1, d] and a filled cache."""

    h: Tensor
    states: Tensor
    self_mask: Tensor | None
    cross_mask: Tensor
    cos_sin: tuple[Tensor, Tensor]
    cache: EncoderDecoderCache | None = None


@dataclass
class Packed:
    """The tokens alone: rows [tokens, d], states [encoder tokens, de]. In decoding the cross K/V
    exist once for each image."""

    rows: Tensor
    states: Tensor
    own: Layout
    cross: Layout
    cos_sin: tuple[Tensor, Tensor]
    cache: tuple[Tensor, Tensor] | None = None
    filled: Tensor | None = None
    ancestry: Tensor | None = None
    cross_kv: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Training:
    """len(lengths) targets, each with an image of its own, padded to longest and most."""

    lengths: tuple[int, ...]
    keys: tuple[int, ...]
    longest: int
    most: int


@dataclass(frozen=True)
class Decoding:
    """One step of images * beams rows, the filled-th token of each."""

    images: int
    beams: int
    keys: int
    filled: int

    @property
    def rows(self) -> int:
        return self.images * self.beams


Work = Training | Decoding


def states_width(d: Decoder) -> int:
    return ENCODER_WIDTH if d.gated else d.width


def _maker(device: str) -> Callable[..., Tensor]:
    return lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device=device)


def _pair(make: Callable[..., Tensor], *shape: int) -> tuple[Tensor, Tensor]:
    return make(*shape), make(*shape)


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """What a cache's layers begin with would be copied to a device: here it has a shape alone."""

    def tensor(data: Any, **kwargs: Any) -> Tensor:
        return torch.empty([len(data)] if isinstance(data, list) else [], **kwargs)

    with mock.patch.object(torch, "tensor", tensor):
        yield


def fill(layers: Cache, index: int, k: Tensor, v: Tensor) -> None:
    """Keys and values of a layer, as transformers' own attention would have left them."""
    with without_values():
        layers.update(k, v, index)


def padded(d: Decoder, work: Work, device: str = DEVICE) -> Padded:
    make, width = _maker(device), states_width(d)
    if isinstance(work, Training):
        batch, longest, most = len(work.lengths), work.longest, work.most
        return Padded(
            h=make(batch, longest, d.width).requires_grad_(),
            states=make(batch, most, width).requires_grad_(),
            self_mask=make(batch, 1, longest, longest),
            cross_mask=make(batch, 1, longest, most),
            cos_sin=_pair(make, 1, longest, d.head_dim),
        )
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for index in (0, 1):
        own = _pair(make, work.rows, d.kv_heads, work.filled - 1, d.head_dim)
        fill(cache.self_attention_cache, index, *own)
        cross = _pair(make, work.rows, d.kv_heads, work.keys, d.head_dim)
        fill(cache.cross_attention_cache, index, *cross)
        cache.is_updated[index] = True
    return Padded(
        h=make(work.rows, 1, d.width),
        states=make(work.rows, work.keys, width),
        self_mask=None,
        cross_mask=make(work.rows, 1, 1, work.keys),
        cos_sin=_pair(make, 1, 1, d.head_dim),
        cache=cache,
    )


def packed(d: Decoder, work: Work, device: str = DEVICE) -> Packed:
    make, width = _maker(device), states_width(d)
    if isinstance(work, Training):
        lengths, keys = list(work.lengths), list(work.keys)
        return Packed(
            rows=make(sum(lengths), d.width).requires_grad_(),
            states=make(sum(keys), width).requires_grad_(),
            own=Layout.from_lengths(lengths).to(device),
            cross=Layout.from_lengths(lengths, keys, list(range(len(lengths)))).to(device),
            cos_sin=_pair(make, sum(lengths), d.head_dim),
        )
    rows, kv = work.rows, (d.kv_heads, d.head_dim)
    whole: dict[str, Any] = {"dtype": torch.int32, "device": device}
    return Packed(
        rows=make(rows, d.width),
        states=make(work.images * work.keys, width),
        own=Layout.from_lengths([1] * rows).to(device),
        cross=Layout.for_beams(work.images, work.beams, [work.keys] * work.images).to(device),
        cos_sin=_pair(make, rows, d.head_dim),
        cache=_pair(make, rows, work.filled, *kv),
        filled=torch.empty(rows, **whole),
        ancestry=torch.empty(rows, work.filled, **whole),
        cross_kv=_pair(make, work.images * work.keys, *kv),
    )
