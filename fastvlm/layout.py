"""Layout: which rows are tokens, which segment they belong to, which image each segment reads.

Inside the package activations are packed, ``[tokens, ...]``; a Layout says what the rows mean. It
is built once per batch, on the host (building one from device tensors waits for the device once),
and then used by every layer without a device-to-host sync.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastvlm.checks import describe

_INT32_MAX = 2**31 - 1


def _fail(argument: str, wanted: str, given: object) -> ValueError:
    return ValueError(f"fastvlm.Layout: {argument} must be {wanted}; got {describe(given)}")


@dataclass(frozen=True)
class Padding:
    """Where the packed rows stand in a padded ``[batch, length]`` grid.

    index: int64 [tokens], flat positions of the token rows; None when every position is a token.
    """

    batch: int
    length: int
    index: Tensor | None

    def pack(self, x: Tensor) -> Tensor:
        """[batch, length, ...] -> [tokens, ...]."""
        if tuple(x.shape[:2]) != (self.batch, self.length):
            raise _fail("the padded tensor", f"[{self.batch}, {self.length}, ...]", x)
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, y: Tensor) -> Tensor:
        """[tokens, ...] -> [batch, length, ...], zeros where there is no token."""
        rows = self.batch * self.length if self.index is None else self.index.shape[0]
        if y.shape[0] != rows:
            raise _fail("the packed tensor", f"[{rows}, ...]", y)
        if self.index is not None:
            zeros = y.new_zeros((self.batch * self.length, *y.shape[1:]))
            y = zeros.index_copy(0, self.index, y)
        return y.unflatten(0, (self.batch, self.length))


@dataclass(frozen=True, eq=False)
class Layout:
    """The meaning of packed rows. Build one with the ``from_*`` and ``for_*`` constructors.

    q_offsets: int32 [S + 1]. Query segment s holds rows q_offsets[s] : q_offsets[s + 1]
        (flash-attn's cu_seqlens convention).
    kv_offsets: int32 [I + 1]. Image i holds key/value rows kv_offsets[i] : kv_offsets[i + 1].
    image_of: int32 [S]. The image that each query segment reads.
    positions: int64 [Tq]. Position of each query row, from 0 in each segment.
    rows_by_image: int64 [Tq], the query rows in image order, or None where they stand so already.
    reader_offsets: int32 [I + 1]. In image order, the query rows that read image i are
        reader_offsets[i] : reader_offsets[i + 1].
    max_q, max_kv: longest segment and longest image. max_readers: the most query rows that read
        one image. num_tokens, num_kv_tokens: Tq and Tk.
    reads_itself: segment s reads image s, of its own length: what self-attention needs.
    q_padding, kv_padding: the padded grids the rows came from; None for a batch packed from birth.
    kv_lengths [I], images [S]: the lengths of the images and image_of, on the host.

    Zero-length segments, images that nobody reads and one segment per image are all valid.
    """

    q_offsets: Tensor
    kv_offsets: Tensor
    image_of: Tensor
    positions: Tensor
    rows_by_image: Tensor | None
    reader_offsets: Tensor
    max_q: int
    max_kv: int
    max_readers: int
    num_tokens: int
    num_kv_tokens: int
    reads_itself: bool
    kv_lengths: tuple[int, ...]
    images: tuple[int, ...]
    q_padding: Padding | None = None
    kv_padding: Padding | None = None

    @property
    def num_segments(self) -> int:
        return self.image_of.shape[0]

    @property
    def num_images(self) -> int:
        return self.kv_offsets.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.q_offsets.device

    @classmethod
    def from_lengths(
        cls,
        q_lengths: Sequence[int] | Tensor,
        kv_lengths: Sequence[int] | Tensor | None = None,
        image_of: Sequence[int] | Tensor | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Layout:
        """From the lengths of the segments and of the images they read; what a collator builds.

        q_lengths [S], kv_lengths [I], image_of [S] with values in [0, I). Without kv_lengths each
        segment reads itself (self-attention); without image_of segment s reads image s.
        device: where the offsets live (default: that of q_lengths if a tensor, else the CPU).

        ValueError: a negative length, an image index out of range, lengths that do not match,
        2^31 rows or more.
        """
        if device is None:
            device = q_lengths.device if isinstance(q_lengths, Tensor) else "cpu"
        q = _ints("q_lengths", q_lengths)
        if kv_lengths is None and image_of is not None:
            raise _fail("kv_lengths", "given when image_of is", None)
        kv = q if kv_lengths is None else _ints("kv_lengths", kv_lengths)
        if image_of is None:
            if len(kv) != len(q):
                wanted = f"given when {len(q)} segments read {len(kv)} images"
                raise _fail("image_of", wanted, None)
            images = list(range(len(q)))
        else:
            images = _ints("image_of", image_of)
        return _build(q, kv, images, torch.device(device))

    @classmethod
    def from_offsets(
        cls,
        q_offsets: Tensor,
        kv_offsets: Tensor | None = None,
        image_of: Tensor | None = None,
    ) -> Layout:
        """From cumulative offsets (cu_seqlens): start at 0, never fall. Otherwise ValueError."""
        q = _lengths("q_offsets", q_offsets)
        kv = None if kv_offsets is None else _lengths("kv_offsets", kv_offsets)
        return cls.from_lengths(q, kv, image_of, device=q_offsets.device)

    @classmethod
    def from_padded(
        cls,
        attention_mask: Tensor,
        kv_attention_mask: Tensor | None = None,
        image_of: Sequence[int] | Tensor | None = None,
    ) -> Layout:
        """From the 2-D masks of a padded batch, as transformers makes them.

        attention_mask [B, L]: non-zero (or True) where a query token stands; padding may be left,
        right or in between. kv_attention_mask [I, K]: the same for keys and values; without it the
        queries read themselves. Where B is a multiple of I and image_of is not given, consecutive
        groups of B / I rows read one image (beams, or several captions of an image).

        ValueError: a mask that is not 2-D, B not a multiple of I without image_of.
        """
        q, q_padding = _from_mask("attention_mask", attention_mask)
        kv, kv_padding = q, q_padding
        if kv_attention_mask is not None:
            kv, kv_padding = _from_mask("kv_attention_mask", kv_attention_mask)
        if image_of is None:
            if len(q) != 0 and (len(kv) == 0 or len(q) % len(kv)):
                wanted = f"of a number of rows that divides the {len(q)} query rows"
                raise _fail("kv_attention_mask", wanted, kv_attention_mask)
            readers = len(q) // max(len(kv), 1)
            images = [row // readers for row in range(len(q))]
        else:
            images = _ints("image_of", image_of)
        layout = _build(q, kv, images, attention_mask.device)
        return replace(layout, q_padding=q_padding, kv_padding=kv_padding)

    @classmethod
    def for_beams(
        cls,
        num_images: int,
        beams: int,
        kv_lengths: Sequence[int] | Tensor,
        *,
        device: torch.device | str | None = None,
    ) -> Layout:
        """A decoding step: one new token for each of ``beams`` rows of each image.

        Row r reads image r // beams, the order in which transformers expands a batch.
        ValueError: counts below 0, or kv_lengths not of length num_images.
        """
        for name, value in (("num_images", num_images), ("beams", beams)):
            if not isinstance(value, int) or value < 0:
                raise _fail(name, "a whole number, 0 or more", value)
        if device is None:
            device = kv_lengths.device if isinstance(kv_lengths, Tensor) else "cpu"
        kv = _ints("kv_lengths", kv_lengths)
        if len(kv) != num_images:
            raise _fail("kv_lengths", f"of length num_images = {num_images}", kv)
        images = [row // beams for row in range(num_images * beams)] if beams else []
        return _build([1] * len(images), kv, images, torch.device(device))

    @classmethod
    def from_flash_kwargs(
        cls,
        cu_seq_lens_q: Tensor,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> Layout:
        """From the keyword arguments with which transformers describes a packed batch.

        cu_seq_lens_q, cu_seq_lens_k: int [S + 1]; segment s reads keys of segment s. The maxima are
        recomputed; given ones that are too small raise ValueError.
        """
        layout = cls.from_offsets(cu_seq_lens_q, cu_seq_lens_k)
        for name, given, longest in (
            ("max_length_q", max_length_q, layout.max_q),
            ("max_length_k", max_length_k, layout.max_kv),
        ):
            if given is not None and given < longest:
                raise _fail(name, f"at least the longest segment, {longest}", given)
        return layout

    def flash_kwargs(self) -> dict[str, Tensor | int]:
        """The keyword arguments of transformers' packed attention.

        ValueError where segments share an image: those arguments cannot say so.
        """
        if self.images != tuple(range(self.num_images)):
            raise _fail("image_of", "one segment per image, in order", self.image_of)
        return {
            "cu_seq_lens_q": self.q_offsets,
            "cu_seq_lens_k": self.kv_offsets,
            "max_length_q": self.max_q,
            "max_length_k": self.max_kv,
        }

    def to(self, device: torch.device | str) -> Layout:
        """The same layout with its tensors on another device."""
        target = torch.device(device)
        if target == self.device:
            return self
        moved: dict[str, Any] = {
            f.name: value.to(target)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        for name in ("q_padding", "kv_padding"):
            padding = getattr(self, name)
            if padding is not None and padding.index is not None:
                moved[name] = replace(padding, index=padding.index.to(target))
        return replace(self, **moved)

    def pack(self, x: Tensor) -> Tensor:
        """Query rows of a padded tensor: [B, L, ...] -> [Tq, ...]."""
        return self._grid("q_padding").pack(x)

    def unpack(self, y: Tensor) -> Tensor:
        """Query rows back to the padded grid: [Tq, ...] -> [B, L, ...], zeros where no token is."""
        return self._grid("q_padding").unpack(y)

    def pack_kv(self, x: Tensor) -> Tensor:
        """Key/value rows of a padded tensor: [I, K, ...] -> [Tk, ...]."""
        return self._grid("kv_padding").pack(x)

    def unpack_kv(self, y: Tensor) -> Tensor:
        """Key/value rows back to the padded grid: [Tk, ...] -> [I, K, ...]."""
        return self._grid("kv_padding").unpack(y)

    def _grid(self, name: str) -> Padding:
        padding: Padding | None = getattr(self, name)
        if padding is None:
            raise ValueError(
                "fastvlm.Layout: this layout was not made from a padded batch "
                "(Layout.from_padded), so there is no grid to pack from or unpack to"
            )
        return padding

    def __repr__(self) -> str:
        return (
            f"Layout(segments={self.num_segments}, tokens={self.num_tokens}, max_q={self.max_q}, "
            f"images={self.num_images}, kv_tokens={self.num_kv_tokens}, max_kv={self.max_kv}, "
            f"device={self.device})"
        )


def _ints(argument: str, values: Sequence[int] | Tensor) -> list[int]:
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.dtype.is_floating_point:
            raise _fail(argument, "a 1-D tensor of integers", values)
        return values.tolist()
    if not isinstance(values, Sequence) or not all(isinstance(v, int) for v in values):
        raise _fail(argument, "a sequence of integers", values)
    return list(values)


def _lengths(argument: str, offsets: Tensor) -> list[int]:
    if not isinstance(offsets, Tensor):
        raise _fail(argument, "a tensor of offsets (cu_seqlens)", offsets)
    values = _ints(argument, offsets)
    if not values or values[0] != 0:
        raise _fail(argument, "offsets that start at 0", values[:4])
    lengths = [b - a for a, b in pairwise(values)]
    if min(lengths, default=0) < 0:
        raise _fail(argument, "offsets that never fall", values)
    return lengths


def _from_mask(argument: str, mask: Tensor) -> tuple[list[int], Padding]:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise _fail(argument, "a 2-D mask [batch, length]", mask)
    tokens = mask != 0
    lengths: list[int] = tokens.sum(1).tolist()
    dense = sum(lengths) == mask.numel()
    index = None if dense else tokens.flatten().nonzero().flatten()
    return lengths, Padding(mask.shape[0], mask.shape[1], index)


def _build(q: list[int], kv: list[int], images: list[int], device: torch.device) -> Layout:
    for name, lengths in (("q_lengths", q), ("kv_lengths", kv)):
        if min(lengths, default=0) < 0:
            raise _fail(name, "0 or more, each", lengths)
        if sum(lengths) > _INT32_MAX:
            raise _fail(name, f"at most {_INT32_MAX} rows in all (int32)", sum(lengths))
    if len(images) != len(q):
        raise _fail("image_of", f"of one entry for each of the {len(q)} segments", images)
    if any(not 0 <= i < len(kv) for i in images):
        raise _fail("image_of", f"in [0, {len(kv)})", images)

    q_lengths = torch.tensor(q, dtype=torch.int64)
    image_of = torch.tensor(images, dtype=torch.int64)
    q_offsets = _offsets(q_lengths)
    segment_of = torch.repeat_interleave(torch.arange(len(q)), q_lengths)
    positions = torch.arange(segment_of.shape[0]) - q_offsets[segment_of]
    image_of_row = image_of[segment_of]
    in_order = all(a <= b for a, b in pairwise(images))
    order = None if in_order else torch.argsort(image_of_row, stable=True)
    readers = torch.bincount(image_of_row, minlength=len(kv))
    return Layout(
        q_offsets=q_offsets.to(device, torch.int32),
        kv_offsets=_offsets(torch.tensor(kv, dtype=torch.int64)).to(device, torch.int32),
        image_of=image_of.to(device, torch.int32),
        positions=positions.to(device),
        rows_by_image=None if order is None else order.to(device),
        reader_offsets=_offsets(readers).to(device, torch.int32),
        max_q=max(q, default=0),
        max_kv=max(kv, default=0),
        max_readers=int(readers.max()) if kv else 0,
        num_tokens=sum(q),
        num_kv_tokens=sum(kv),
        reads_itself=q == kv and images == list(range(len(q))),
        kv_lengths=tuple(kv),
        images=tuple(images),
    )


def _offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
