"""The bias of the distance between key and query, on every floor of the attention ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plain
import pytest
import torch
from torch import Tensor

import fastvlm
from fastvlm import Layout, ops
from fastvlm.cuda import attention as cuda_attention
from fastvlm.ops.attention import arguments_of
from fastvlm.reference import attention as reference
from fastvlm.triton import attention as triton_attention

# few rows of a segment stream their keys, many are done in panels; longer than the table and not
SEGMENTS = {"odd": [3, 0, 63, 1, 100], "few": [5, 1, 7], "long": [300]}
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (5, 1)}


def table(heads: int, reach: int, grad: bool = True) -> Tensor:
    return torch.randn(heads, 2 * reach + 1).requires_grad_(grad)


@pytest.mark.parametrize(
    ("batch", "heads", "reach", "causal"),
    [
        *(("odd", "mha", 9, True), ("odd", "gqa", 128, False), ("few", "mqa", 2, False)),
        *(("few", "gqa", 1, True), ("long", "mha", 128, False), ("long", "gqa", 9, True)),
    ],
)
def test_self_attention(
    batch: str,
    heads: str,
    reach: int,
    causal: bool,
    on: Any,
    randn: Any,
    follows_the_error_rule: Any,
) -> None:
    lengths, (h, h_kv) = SEGMENTS[batch], HEADS[heads]
    layout = Layout.from_lengths(lengths)
    same = (lengths, lengths, list(range(len(lengths))))
    settings: dict[str, Any] = {"causal": causal, "scale": 0.2}
    if heads == "gqa":
        settings |= {"softcap": 5.0, "window": 20}
    inputs = [randn(sum(lengths), n, 40, grad=True) for n in (h, h_kv, h_kv)]
    follows_the_error_rule(
        lambda q, k, v, b: on(ops.self_attention, q, k, v, layout, position_bias=b, **settings),
        lambda q, k, v, b: plain.attention(q, k, v, *same, position_bias=b, **settings),
        [*inputs, table(h, reach)],
    )


@pytest.mark.parametrize(
    ("heads", "reach", "ancestry"),
    [("mha", 4, "none"), ("gqa", 30, "beams"), ("mqa", 0, "none"), ("gqa", 4, "padding")],
)
def test_cached_attention(
    heads: str,
    reach: int,
    ancestry: str,
    on: Any,
    randn: Any,
    follows_the_error_rule: Any,
) -> None:
    h, h_kv = HEADS[heads]
    rows, time, lengths = 5, 19, [19, 1, 7, 0, 12]
    of = None
    if ancestry == "beams":
        of = torch.randint(0, 8, (rows, time), dtype=torch.int32)
    elif ancestry == "padding":
        of = torch.where(torch.rand(rows, time) < 0.4, -1, torch.arange(rows)[:, None]).int()
    settings = {"window": 9 if heads == "gqa" else None, "softcap": 5.0 if heads == "gqa" else None}
    inputs = [randn(rows, h, 40), randn(8, time, h_kv, 40), randn(8, time, h_kv, 40)]
    follows_the_error_rule(
        lambda q, k, v, b: on(
            *(ops.cached_attention, q, k, v, torch.tensor(lengths)),
            **{"ancestry": of, "position_bias": b, **settings},
        ),
        lambda q, k, v, b: plain.cached_attention(
            q, k, v, lengths, of, position_bias=b, **settings
        ),
        [*inputs, table(h, reach, grad=False)],
    )


def test_a_long_cache_is_cut_into_blocks(randn: Any, follows_the_error_rule: Any) -> None:
    lengths = [1300, 513]
    inputs = [randn(2, 2, 16), randn(2, 1300, 2, 16), randn(2, 1300, 2, 16)]
    follows_the_error_rule(
        lambda q, k, v, b: ops.cached_attention(q, k, v, torch.tensor(lengths), position_bias=b),
        lambda q, k, v, b: plain.cached_attention(q, k, v, lengths, position_bias=b),
        [*inputs, table(2, 700, grad=False)],
    )


def test_only_what_is_wanted(on: Any) -> None:
    """The table alone, and all but the table."""
    layout = Layout.from_lengths([40, 3])
    q, k, v = (torch.randn(43, 2, 16) for _ in range(3))
    everything = [x.requires_grad_() for x in (q, k, v, table(2, 9))]
    run = lambda *x: on(ops.self_attention, *x[:3], layout, position_bias=x[3])  # noqa: E731
    want = torch.autograd.grad(run(*everything).sin().sum(), everything)
    for wanted in ((3,), (0, 1, 2), (1,)):
        inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(everything)]
        got = torch.autograd.grad(run(*inputs).sin().sum(), [inputs[i] for i in wanted])
        assert all(torch.equal(a, want[i]) for a, i in zip(got, wanted))


def test_gradients_of_rows_that_see_nothing_and_of_no_rows(on: Any) -> None:
    for lengths in ([], [0, 0]):
        q, bias = torch.randn(0, 2, 16, requires_grad=True), table(2, 3)
        out = on(ops.self_attention, q, q, q, Layout.from_lengths(lengths), position_bias=bias)
        assert torch.autograd.grad(out.sum(), bias)[0].equal(torch.zeros(2, 7))


def test_packed_rows_are_those_of_a_padded_batch() -> None:
    """Left, right or no padding: the distance of two tokens is that of their columns."""
    q, k, v = (torch.randn(3, 6, 2, 8) for _ in range(3))
    bias = table(2, 2, grad=False)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1] * 6])
    layout = Layout.from_padded(mask)
    out = ops.self_attention(*(layout.pack(x) for x in (q, k, v)), layout, position_bias=bias)
    columns = torch.arange(6)
    distance = (columns - columns[:, None]).clamp(-2, 2) + 2
    seen = (mask[:, None, None] == 1) & (columns <= columns[:, None])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5 + bias[:, distance]
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    exact = torch.einsum("bhqk,bkhd->bqhd", p, v)
    assert torch.allclose(out, exact[mask == 1], atol=1e-5)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no-tensor": (3.0, TypeError, r"position_bias must be a torch.Tensor; got 3.0"),
    "dtype": (torch.randn(4, 5).half(), ValueError, "position_bias must be float32.*got a float16"),
    "double": (torch.randn(4, 5).double(), ValueError, "position_bias must be float32.*float64"),
    "device": (torch.randn(4, 5, device="meta"), ValueError, "position_bias must be on the device"),
    "heads": (torch.randn(2, 5), ValueError, r"position_bias must be of shape \[4, any\].*2, 5"),
    "dims": (torch.randn(5), ValueError, r"position_bias must be of shape \[4, any\]"),
    "even": (torch.randn(4, 6), ValueError, "position_bias must be of an odd number of columns"),
    "empty": (torch.randn(4, 0), ValueError, "position_bias must be of an odd number of columns"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    value, kind, message = BAD[case]
    q, k = torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    with pytest.raises(kind, match=f"self_attention: {message}"):
        ops.self_attention(q, k, k, Layout.from_lengths([3]), position_bias=value)
    cache = torch.randn(3, 5, 2, 8)
    with pytest.raises(kind, match=f"cached_attention: {message}"):
        ops.cached_attention(q, cache, cache, torch.tensor([1, 2, 3]), position_bias=value)


def test_kernels_without_it_say_so() -> None:
    """Dispatch then leaves them out, and the reference serves."""
    layout, bias = Layout.from_lengths([3]), torch.randn(4, 5)
    q, k = torch.randn(3, 4, 64).bfloat16(), torch.randn(3, 4, 64).bfloat16()
    settings = (False, 0, 0.125, 0.0, 0.0)
    where, stats = arguments_of(layout), torch.randn(3, 4, 2)
    cache = torch.randn(3, 5, 4, 64).bfloat16()
    lengths = torch.tensor([1, 2, 3], dtype=torch.int32)
    calls: dict[str, tuple[Any, ...]] = {
        "cross_attention": (q, k, k, *where, *settings),
        "self_attention": (q, k, k, *where, *settings),
        "self_attention_backward": (q, q, k, k, q, stats, *where, *settings, [True] * 3),
        "cached_attention": (q, cache, cache, lengths, None, 0, 0.125, 0.0),
    }
    for backend in (cuda_attention, triton_attention):
        served = backend.LAUNCHERS.keys() & calls.keys()
        assert len(served) >= 2
        for name in served:
            unsupported = backend.LAUNCHERS[name].unsupported
            assert unsupported(*calls[name]) is None
            assert unsupported(*calls[name], None) is None
            assert unsupported(*calls[name], bias) == "position_bias"


def _shifted(entries: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda places, keys, bias: entries(places + 1, keys, bias)


def test_a_planted_bug_is_seen(monkeypatch: Any, follows_the_error_rule: Any) -> None:
    """A distance that is off by one, and a gradient that is left out at the far ends."""
    layout = Layout.from_lengths([30])
    inputs = [torch.randn(30, 2, 8, requires_grad=True) for _ in range(3)]
    inputs.append(table(2, 4))

    def check() -> None:
        follows_the_error_rule(
            lambda q, k, v, b: ops.self_attention(q, k, v, layout, position_bias=b),
            lambda q, k, v, b: plain.attention(
                *(q, k, v, [30], [30], [0]), causal=True, position_bias=b
            ),
            inputs,
        )

    with fastvlm.use("reference"):
        check()
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_entries", _shifted(reference._entries))
            with pytest.raises(AssertionError, match="output 0"):
                check()
        add = reference._add_at

        def near(sums: Tensor, entries: Tensor, values: Tensor) -> None:
            add(sums, entries, values.masked_fill(entries == 0, 0))

        monkeypatch.setattr(reference, "_add_at", near)
        with pytest.raises(AssertionError, match="gradient of input 3"):
            check()
