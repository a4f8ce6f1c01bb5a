"""Layout: round trips, offsets against brute force, and everything it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvlm import Layout

lengths = st.lists(st.integers(0, 6), max_size=6)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Padding on the left, on the right, in between, everywhere or nowhere."""
    batch, length = draw(st.integers(0, 5)), draw(st.integers(1, 7))
    kind = draw(st.sampled_from(["left", "right", "holes", "ones"]))
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in mask:
        if kind == "holes":
            row[:] = torch.tensor(
                draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
            )
        elif kind != "ones":
            n = draw(st.integers(0, length))
            row[: length - n] = 0 if kind == "left" else row[: length - n]
            if kind == "right":
                row[n:] = 0
    return mask


@st.composite
def shared(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Segments, images and which image each segment reads: in any order, some unread."""
    kv = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    q = draw(lengths)
    return q, kv, [draw(st.integers(0, len(kv) - 1)) for _ in q]


@settings(deadline=None)
@given(masks())
def test_padded_to_packed_and_back(mask: Tensor) -> None:
    layout = Layout.from_padded(mask)
    x = torch.randn(*mask.shape, 3)
    packed = layout.pack(x)
    assert torch.equal(packed, x[mask.bool()])
    assert torch.equal(layout.unpack(packed), x * mask.unsqueeze(-1))
    assert layout.num_tokens == int(mask.sum())
    assert torch.equal(layout.pack_kv(x), packed)
    assert torch.equal(layout.unpack_kv(packed), layout.unpack(packed))


def test_an_all_ones_mask_copies_nothing() -> None:
    x = torch.randn(2, 3, 4)
    layout = Layout.from_padded(torch.ones(2, 3))
    assert layout.pack(x).data_ptr() == x.data_ptr()
    assert layout.unpack(layout.pack(x)).data_ptr() == x.data_ptr()


@settings(deadline=None)
@given(shared())
def test_offsets_against_brute_force(case: tuple[list[int], list[int], list[int]]) -> None:
    q, kv, image_of = case
    layout = Layout.from_lengths(q, kv, image_of)
    assert layout.q_offsets.tolist() == [sum(q[:i]) for i in range(len(q) + 1)]
    assert layout.kv_offsets.tolist() == [sum(kv[:i]) for i in range(len(kv) + 1)]
    assert layout.q_offsets.dtype == layout.kv_offsets.dtype == torch.int32
    assert layout.image_of.tolist() == image_of
    assert layout.positions.tolist() == [p for n in q for p in range(n)]
    assert (layout.max_q, layout.max_kv) == (max(q, default=0), max(kv))
    assert (layout.num_tokens, layout.num_kv_tokens) == (sum(q), sum(kv))
    assert (layout.num_segments, layout.num_images) == (len(q), len(kv))
    assert layout.reads_itself == (q == kv and image_of == list(range(len(q))))
    # rows in image order: each image's readers are neighbours, in the order they came
    image_of_row = [i for n, i in zip(q, image_of) for _ in range(n)]
    order = layout.rows_by_image
    rows = list(range(sum(q))) if order is None else order.tolist()
    assert rows == sorted(range(sum(q)), key=lambda r: (image_of_row[r], r))
    for image in range(len(kv)):
        start, end = layout.reader_offsets[image : image + 2].tolist()
        assert all(image_of_row[r] == image for r in rows[start:end])
        assert end - start == image_of_row.count(image)


@settings(deadline=None)
@given(lengths, lengths)
def test_flash_arguments_both_ways(q: list[int], kv: list[int]) -> None:
    size = min(len(q), len(kv))
    layout = Layout.from_lengths(q[:size], kv[:size])
    again = Layout.from_flash_kwargs(**layout.flash_kwargs())
    assert torch.equal(again.q_offsets, layout.q_offsets)
    assert torch.equal(again.kv_offsets, layout.kv_offsets)
    assert torch.equal(again.image_of, layout.image_of)


def test_flash_arguments_cannot_say_that_segments_share_an_image() -> None:
    with pytest.raises(ValueError, match="image_of must be one segment per image"):
        Layout.from_lengths([1, 2], [3], [0, 0]).flash_kwargs()
    offsets = torch.tensor([0, 5])
    with pytest.raises(ValueError, match="max_length_q must be at least the longest segment, 5"):
        Layout.from_flash_kwargs(offsets, offsets, 4, 5)


def test_beams_read_the_image_they_belong_to() -> None:
    layout = Layout.for_beams(2, 3, [10, 4])
    assert layout.image_of.tolist() == [0, 0, 0, 1, 1, 1]
    assert layout.q_offsets.tolist() == list(range(7))
    assert layout.rows_by_image is None
    assert Layout.for_beams(2, 0, [1, 1]).num_tokens == 0


def test_a_batch_of_beams_against_a_batch_of_images() -> None:
    layout = Layout.from_padded(torch.ones(6, 1), torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert layout.image_of.tolist() == [0, 0, 0, 1, 1, 1]
    assert layout.kv_offsets.tolist() == [0, 3, 4]
    given_images = Layout.from_padded(torch.ones(3, 2), torch.ones(2, 4), image_of=[1, 0, 1])
    assert given_images.rows_by_image is not None


def test_gradients_pass_through_packing() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    layout = Layout.from_padded(mask)
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layout.unpack(layout.pack(x).sin()), x)


def test_pickle_copy_and_device() -> None:
    layout = Layout.from_padded(torch.tensor([[1, 0], [1, 1]]), torch.ones(2, 3), image_of=[1, 0])
    for other in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
        assert torch.equal(other.q_offsets, layout.q_offsets)
        assert torch.equal(other.rows_by_image, layout.rows_by_image)
        assert other.q_padding.length == 2
    moved = layout.to("meta")
    assert moved.device.type == "meta"
    assert moved.q_padding.index.device.type == "meta"
    assert layout.to("cpu") is layout
    assert "segments=2, tokens=3" in repr(layout)


def test_from_offsets_is_from_lengths() -> None:
    layout = Layout.from_offsets(
        torch.tensor([0, 2, 2, 5]), torch.tensor([0, 4, 7]), torch.tensor([1, 0, 1])
    )
    same = Layout.from_lengths([2, 0, 3], [4, 3], [1, 0, 1])
    for name in ("q_offsets", "kv_offsets", "image_of", "positions", "reader_offsets"):
        assert torch.equal(getattr(layout, name), getattr(same, name))
    assert Layout.from_offsets(torch.tensor([0, 3, 4])).reads_itself


def test_too_many_rows_are_refused_before_memory_is_asked_for() -> None:
    """A table of 2^62 positions could not be had: the refusal comes first."""
    for make in (
        lambda: Layout.from_lengths([2**62]),
        lambda: Layout.from_offsets(torch.tensor([0, 2**62])),
        lambda: Layout.for_beams(1, 1, [2**62]),
    ):
        with pytest.raises(ValueError, match="must be at most 2147483647 rows in all"):
            make()


REFUSED = {
    "negative": (lambda: Layout.from_lengths([3, -1]), "q_lengths must be 0 or more"),
    "float": (lambda: Layout.from_lengths(torch.ones(2)), "q_lengths must be a 1-D tensor of int"),
    "not-whole": (lambda: Layout.from_lengths([1.5]), "q_lengths must be a sequence of integers"),
    "one-number": (lambda: Layout.from_lengths(3), "q_lengths must be a sequence of integers"),
    "2-d": (
        lambda: Layout.from_lengths(torch.ones(2, 2).long()),
        "q_lengths must be a 1-D tensor of integers",
    ),
    "list-of-offsets": (
        lambda: Layout.from_offsets([0, 3]),
        "q_offsets must be a tensor of offsets",
    ),
    "list-of-kv-offsets": (
        lambda: Layout.from_offsets(torch.tensor([0, 3]), [0, 3]),
        "kv_offsets must be a tensor of offsets",
    ),
    "no-image-of": (lambda: Layout.from_lengths([1, 2], [3]), "image_of must be given when 2 seg"),
    "no-kv": (lambda: Layout.from_lengths([1], None, [0]), "kv_lengths must be given"),
    "too-many-images": (
        lambda: Layout.from_lengths([1], [3], [0, 0]),
        "image_of must be of one entry for each of the 1 segments",
    ),
    "image-past-the-end": (lambda: Layout.from_lengths([1], [3], [1]), r"image_of must be in \[0"),
    "negative-image": (lambda: Layout.from_lengths([1], [3], [-1]), r"image_of must be in \[0, 1"),
    "falling": (
        lambda: Layout.from_offsets(torch.tensor([0, 5, 3])),
        "q_offsets must be offsets that never fall",
    ),
    "start": (
        lambda: Layout.from_offsets(torch.tensor([1, 5])),
        "q_offsets must be offsets that start at 0",
    ),
    "empty-offsets": (
        lambda: Layout.from_offsets(torch.zeros(0, dtype=torch.int32)),
        "q_offsets must be offsets that start at 0",
    ),
    "mask-1d": (lambda: Layout.from_padded(torch.ones(3)), "attention_mask must be a 2-D mask"),
    "mask-4d": (
        lambda: Layout.from_padded(torch.ones(2, 3), torch.ones(2, 1, 3, 3)),
        "kv_attention_mask must be a 2-D mask",
    ),
    "batch": (
        lambda: Layout.from_padded(torch.ones(3, 2), torch.ones(2, 2)),
        "kv_attention_mask must be of a number of rows that divides the 3 query rows",
    ),
    "beams": (lambda: Layout.for_beams(2, -1, [1, 1]), "beams must be a whole number"),
    "images": (lambda: Layout.for_beams(2, 1, [1]), "kv_lengths must be of length num_images = 2"),
    "int32": (lambda: Layout.from_lengths([2**30, 2**30]), "q_lengths must be at most 2147483647"),
    "int32-kv": (
        lambda: Layout.from_lengths([1], [2**31], [0]),
        "kv_lengths must be at most 2147483647",
    ),
    "pack": (
        lambda: Layout.from_padded(torch.ones(2, 3)).pack(torch.ones(3, 2)),
        r"the padded tensor must be \[2, 3, ...\]; got a float32 tensor of shape \[3, 2\]",
    ),
    "unpack": (
        lambda: Layout.from_padded(torch.ones(2, 3)).unpack(torch.ones(5, 1)),
        r"the packed tensor must be \[6, ...\]",
    ),
    "no-grid": (
        lambda: Layout.from_lengths([1]).unpack(torch.ones(1)),
        "was not made from a padded batch",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()
