"""Attention in two parts, and the logsumexp by which they are joined."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
from torch import Tensor

from fastvlm import Layout, ops
from fastvlm.ops import dispatch

# segments, the images that they read; few rows of an image stream its keys, many go in panels
BATCHES: dict[str, tuple[list[int], list[int], list[int]]] = {
    "one": ([5], [9], [0]),
    "shared": ([3, 17, 40, 1], [33, 70], [1, 0, 1, 1]),
    "empty-image": ([4, 6], [0, 7], [0, 1]),
}
HEADS = {"mha": (2, 2, 64), "gqa": (4, 2, 24), "odd": (3, 1, 17)}
served = pytest.mark.parametrize("backend", ["reference", "cpu"])


@served
@pytest.mark.parametrize(
    ("batch", "heads", "window", "softcap"),
    [
        *(("one", "mha", None, None), ("shared", "gqa", 4, 5.0), ("shared", "odd", None, None)),
        *(("empty-image", "gqa", 3, None), ("shared", "mha", None, 5.0)),
    ],
)
def test_one_softmax_over_both(
    batch: str,
    heads: str,
    window: int | None,
    softcap: float | None,
    on: Any,
    randn: Any,
    follows_the_error_rule: Any,
) -> None:
    lengths, images, image_of = BATCHES[batch]
    h, h_kv, d = HEADS[heads]
    own, cross = Layout.from_lengths(lengths), Layout.from_lengths(lengths, images, image_of)

    def ours(q: Tensor, k: Tensor, v: Tensor, k_image: Tensor, v_image: Tensor) -> Tensor:
        ask: dict[str, Any] = {"softcap": softcap, "return_lse": True}
        first = on(ops.self_attention, q, k, v, own, window=window, **ask)
        second = on(ops.cross_attention, q, k_image, v_image, cross, **ask)
        merged: Tensor = on(ops.merge_attention, *first, *second)
        return merged

    rows, tokens = sum(lengths), sum(images)
    inputs = [randn(rows, n, d, grad=True) for n in (h, h_kv, h_kv)]
    inputs += [randn(tokens, h_kv, d, grad=True) for _ in range(2)]
    follows_the_error_rule(
        ours,
        lambda *x: plain.merged_attention(*x, *BATCHES[batch], window, softcap),
        inputs,
    )


@served
@pytest.mark.parametrize("heads", HEADS)
def test_the_logsumexp_and_its_gradient(
    heads: str, on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    lengths, (h, h_kv, d) = [5, 30, 1], HEADS[heads]
    layout = Layout.from_lengths(lengths)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        none = (k[:0], v[:0], lengths, [0], [0, 0, 0], 4, 5.0)
        scores = plain.merged_scores(q, k, *none[:1], *none[2:])
        lse = torch.cat([s.logsumexp(-1).t() for s in scores])
        return plain.merged_attention(q, k, v, *none), lse

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        settings: dict[str, Any] = {"window": 4, "softcap": 5.0, "return_lse": True}
        out, lse = on(ops.self_attention, q, k, v, layout, **settings)
        assert lse.dtype == torch.float32 or q.dtype == torch.float64
        return out, lse.to(q.dtype)

    follows_the_error_rule(
        ours,
        exact,
        [randn(36, n, d, grad=True) for n in (h, h_kv, h_kv)],
    )


@served
@pytest.mark.parametrize(("heads", "window"), [("mha", None), ("gqa", 4), ("odd", None)])
def test_a_step(
    heads: str, window: int | None, on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    """Rows with their own cache rows and positions, of which some see none."""
    h, h_kv, d = HEADS[heads]
    filled, images, image_of = [19, 1, 7, 0], [33, 5], [0, 0, 1, 1]
    table = torch.randint(0, 4, (4, 19), dtype=torch.int32)
    table[2, 3:6] = -1
    cross = Layout.from_lengths([1] * 4, images, image_of)
    settings: dict[str, Any] = {"ancestry": table, "window": window, "return_lse": True}

    def ours(q: Tensor, k: Tensor, v: Tensor, k_image: Tensor, v_image: Tensor) -> Tensor:
        own = on(ops.cached_attention, q, k, v, torch.tensor(filled), **settings)
        other = on(ops.cross_attention, q, k_image, v_image, cross, return_lse=True)
        merged: Tensor = on(ops.merge_attention, *own, *other)
        return merged

    def theirs(q: Tensor, k: Tensor, v: Tensor, k_image: Tensor, v_image: Tensor) -> Tensor:
        out = []
        for r, length in enumerate(filled):
            first = 0 if window is None else max(0, length - window)
            seen = [(int(table[r, t]), t) for t in range(first, length) if table[r, t] >= 0]
            keys, values = (
                torch.cat([torch.stack([c[s] for s in seen]) if seen else c[0, :0], part])
                for c, part in (
                    (k, k_image.split(images)[image_of[r]]),
                    (v, v_image.split(images)[image_of[r]]),
                )
            )
            out.append(plain.attention(q[r : r + 1], keys, values, [1], [len(keys)], [0]))
        return torch.cat(out)

    inputs = [randn(4, h, d), randn(4, 19, h_kv, d), randn(4, 19, h_kv, d)]
    follows_the_error_rule(ours, theirs, [*inputs, *(randn(38, h_kv, d) for _ in range(2))])


@served
def test_rows_that_see_nothing(on: Any) -> None:
    """In one part, or in both: no NaN, forward or backward."""
    nothing = torch.full((3, 2), -torch.inf)
    out, other = (torch.randn(3, 2, 8, requires_grad=True) for _ in range(2))
    lse = torch.randn(3, 2, requires_grad=True)
    merged = on(ops.merge_attention, out, lse, other, nothing)
    assert torch.equal(merged, out)
    merged.sin().sum().backward()
    assert torch.equal(out.grad, out.detach().cos())
    assert not other.grad.any()
    assert not lse.grad.any()
    zeros = torch.zeros(3, 2, 8)
    assert torch.equal(on(ops.merge_attention, zeros, nothing, zeros, nothing), zeros)
    layout = Layout.from_lengths([3], [0], [0])
    got, none = on(
        ops.cross_attention, torch.randn(3, 2, 8), zeros[:0], zeros[:0], layout, return_lse=True
    )
    assert torch.equal(got, zeros)
    assert torch.equal(none, nothing)
    cache = torch.randn(2, 4, 1, 8)
    _, lse = on(
        ops.cached_attention, torch.randn(2, 2, 8), cache, cache, torch.tensor([0, 3]),
        return_lse=True,
    )  # fmt: skip
    assert lse[0].isneginf().all()
    assert lse[1].isfinite().all()


def test_dropout_leaves_the_logsumexp() -> None:
    layout = Layout.from_lengths([40])
    q, k, v = (torch.randn(40, 2, 16) for _ in range(3))
    lse = ops.self_attention(q, k, v, layout, return_lse=True)[1]
    dropped = ops.self_attention(q, k, v, layout, return_lse=True, dropout_p=0.4)[1]
    assert torch.equal(lse, dropped)


def _asked(name: str, *args: Any) -> str | None:
    """Why a backend for a GPU does not serve a call."""
    return dispatch.OPS[name].kernels["triton"].unsupported(*args)


def test_what_kernels_for_a_gpu_do_not_know_goes_to_the_reference() -> None:
    layout = Layout.from_lengths([5])
    q = torch.randn(5, 2, 16)
    where = (*_where(layout), False, 3, 0.25, 0.0, 0.0)
    back = (q, q, q, q, q, torch.randn(5, 2, 2), *where, [True] * 3, None, False)
    assert "behind a row" in str(_asked("self_attention", q, q, q, *where, None, 2))
    assert "behind a row" in str(_asked("self_attention_backward", *back, 2))
    assert "logsumexp" in str(_asked("self_attention_backward", *back, 0, torch.ones(5, 2)))
    assert _asked("self_attention_backward", *back, 0, None) is None
    assert _asked("self_attention", q, q, q, *where) is None


def _where(layout: Layout) -> tuple[Any, ...]:
    from fastvlm.ops.attention import arguments_of

    return arguments_of(layout)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no-tensor": ({"lse": 1.0}, TypeError, "lse must be a torch.Tensor; got 1.0"),
    "dtype": ({"other": torch.randn(3, 2, 8).half()}, ValueError, "other must be of the dtype"),
    "shape": ({"other": torch.randn(3, 2, 9)}, ValueError, r"other must be of shape \[3, 2, 8\]"),
    "dims": ({"out": torch.randn(3, 8)}, ValueError, "out must be of shape"),
    "lse-dtype": ({"lse": torch.randn(3, 2).half()}, ValueError, "lse must be float32"),
    "lse-shape": ({"other_lse": torch.randn(3)}, ValueError, r"other_lse must be of shape \[3, 2"),
    "device": (
        {"lse": torch.randn(3, 2, device="meta")},
        ValueError,
        "lse must be on the device of out",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    given, kind, message = BAD[case]
    good = {"out": torch.randn(3, 2, 8), "lse": torch.randn(3, 2)}
    good |= {"other": torch.randn(3, 2, 8), "other_lse": torch.randn(3, 2)}
    with pytest.raises(kind, match=f"merge_attention: {message}"):
        ops.merge_attention(**{**good, **given})


@pytest.mark.parametrize("window", [(1,), (1, -1), (1, 2, 3), (1.5, 2), ("a", 1)])
def test_a_window_of_two_sides_that_is_none(window: Any) -> None:
    q = torch.randn(5, 2, 8)
    with pytest.raises(ValueError, match=r"self_attention: window must be .* a pair of them"):
        ops.self_attention(q, q, q, Layout.from_lengths([5]), causal=False, window=window)
