"""cross_attention, self_attention and cached_attention against plain attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import error_rule
import plain
import pytest
import torch
from torch import Tensor

from fastvlm import Layout, ops
from fastvlm.ops.attention import arguments_of

# q lengths, kv lengths, image of each segment
BATCHES = {
    "one-image": ([3, 17], [63], [0, 0]),
    "beams": ([1] * 6, [100, 577], [0, 0, 0, 1, 1, 1]),
    "captions-interleaved": ([5, 0, 40, 1, 9], [17, 100, 3], [1, 0, 2, 1, 0]),
    "image-nobody-reads": ([4, 7], [9, 33, 1], [2, 0]),
    "empty-image": ([4, 7], [0, 33], [0, 1]),
    "no-rows": ([], [5], []),
    "one-row": ([1], [1], [0]),
}
# heads, kv heads, head dim
HEADS = {"mha64": (2, 2, 64), "gqa256": (4, 2, 256), "mqa96": (3, 1, 96), "odd": (2, 1, 17)}
SELF = {"odd": [3, 0, 63, 1, 100], "one": [17], "long": [300]}


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["nocap", "cap"])
@pytest.mark.parametrize("heads", list(HEADS))
@pytest.mark.parametrize("batch", list(BATCHES))
def test_cross_attention(
    batch: str,
    heads: str,
    softcap: float | None,
    on: Any,
    randn: Any,
    follows_the_error_rule: Any,
) -> None:
    lengths = BATCHES[batch]
    h, h_kv, d = HEADS[heads]
    layout = Layout.from_lengths(*lengths)
    inputs = [randn(sum(lengths[0]), h, d, grad=True)]
    inputs += [randn(sum(lengths[1]), h_kv, d, grad=True) for _ in range(2)]
    follows_the_error_rule(
        lambda q, k, v: on(ops.cross_attention, q, k, v, layout, softcap=softcap),
        lambda q, k, v: plain.attention(q, k, v, *lengths, softcap=softcap),
        inputs,
    )


@pytest.mark.parametrize("softcap", [None, 50.0], ids=["nocap", "cap"])
@pytest.mark.parametrize("window", [None, 7], ids=["full", "window"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("batch", list(SELF))
def test_self_attention(
    batch: str,
    causal: bool,
    window: int | None,
    softcap: float | None,
    on: Any,
    randn: Any,
    follows_the_error_rule: Any,
) -> None:
    lengths = SELF[batch]
    layout = Layout.from_lengths(lengths)
    same = (lengths, lengths, list(range(len(lengths))))
    settings = {"causal": causal, "window": window, "softcap": softcap, "scale": 0.2}
    inputs = [randn(sum(lengths), h, 64, grad=True) for h in (4, 2, 2)]
    follows_the_error_rule(
        lambda q, k, v: on(ops.self_attention, q, k, v, layout, **settings),
        lambda q, k, v: plain.attention(q, k, v, *same, **settings),
        inputs,
    )


@pytest.mark.parametrize("window", [(3, 0), (0, 5), (2, 3), (400, 1), (0, 0)])
@pytest.mark.parametrize("batch", ["odd", "one"])
def test_a_window_of_two_sides(
    batch: str, window: tuple[int, int], on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    lengths = SELF[batch]
    layout = Layout.from_lengths(lengths)
    same = (lengths, lengths, list(range(len(lengths))))
    settings = {"causal": False, "window": window}
    follows_the_error_rule(
        lambda q, k, v: on(ops.self_attention, q, k, v, layout, **settings),
        lambda q, k, v: plain.attention(q, k, v, *same, **settings),
        [randn(sum(lengths), h, 24, grad=True) for h in (4, 2, 2)],
    )


def test_strides_of_any_kind(on: Any, randn: Any, follows_the_error_rule: Any) -> None:
    """Heads before rows, a slice of a fused projection, and a last dimension that is not dense."""
    lengths = [5, 12]
    layout = Layout.from_lengths(lengths)
    same = (lengths, lengths, [0, 1])
    fused = randn(17, 3, 2, 64)
    for q, k, v in (
        fused.unbind(1),
        randn(3, 2, 17, 64).transpose(1, 2).unbind(0),
        randn(3, 17, 2, 128)[..., ::2].unbind(0),
    ):
        follows_the_error_rule(
            lambda q, k, v: on(ops.self_attention, q, k, v, layout, causal=False),
            lambda q, k, v: plain.attention(q, k, v, *same),
            [x.detach() for x in (q, k, v)],
        )


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["nocap", "cap"])
@pytest.mark.parametrize("window", [None, 4], ids=["full", "window"])
@pytest.mark.parametrize("ancestry", ["none", "beams", "padding"])
@pytest.mark.parametrize("heads", ["mha64", "gqa256", "odd"])
def test_cached_attention(
    heads: str,
    ancestry: str,
    window: int | None,
    softcap: float | None,
    on: Any,
    randn: Any,
    follows_the_error_rule: Any,
) -> None:
    h, h_kv, d = HEADS[heads]
    rows, time, lengths = 5, 19, [19, 1, 7, 0, 12]
    table = None
    if ancestry == "beams":
        table = torch.randint(0, 8, (rows, time), dtype=torch.int32)
    elif ancestry == "padding":
        table = torch.where(torch.rand(rows, time) < 0.4, -1, torch.arange(rows)[:, None]).int()
    inputs = [randn(rows, h, d), randn(8, h_kv, time, d), randn(8, h_kv, time, d)]
    settings = {"window": window, "softcap": softcap}
    follows_the_error_rule(
        lambda q, k, v: on(
            ops.cached_attention,
            q,
            k.transpose(1, 2),
            v.transpose(1, 2),
            torch.tensor(lengths),
            ancestry=table,
            **settings,
        ),
        lambda q, k, v: plain.cached_attention(
            q, k.transpose(1, 2), v.transpose(1, 2), lengths, table, **settings
        ),
        inputs,
    )


def test_unfilled_positions_of_a_cache_may_hold_anything(on: Any) -> None:
    cache = torch.randn(2, 6, 1, 8)
    cache[0, 3:] = cache[1, 1:] = float("nan")
    lengths = torch.tensor([3, 1])
    out = on(ops.cached_attention, torch.randn(2, 2, 8), cache, cache, lengths)
    assert not out.isnan().any()


def test_cached_attention_has_a_gradient_from_the_reference() -> None:
    q, k, v = (torch.randn(*s, requires_grad=True) for s in [(2, 2, 8), (2, 5, 1, 8), (2, 5, 1, 8)])
    ops.cached_attention(q, k, v, torch.tensor([5, 3])).sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad[1, 3:].abs().max() == 0


def test_readers_share_gradients_of_their_image_deterministically() -> None:
    layout = Layout.from_lengths([40, 3, 50, 9], [100, 63], [0, 1, 0, 1])
    q, k, v = torch.randn(102, 4, 64), torch.randn(163, 2, 64), torch.randn(163, 2, 64)

    def gradients() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        ops.cross_attention(*leaves, layout).square().sum().backward()
        return [x.grad for x in leaves]

    for a, b in zip(gradients(), gradients()):
        assert torch.equal(a, b)


class TestDropout:
    """With v the identity, the output is the dropped matrix of probabilities itself."""

    P = 0.3

    def probabilities(self, p: float, q: Tensor, k: Tensor) -> Tensor:
        layout = Layout.from_lengths([q.shape[0]], [k.shape[0]], [0])
        v = torch.eye(k.shape[0]).unsqueeze(1)
        return ops.cross_attention(q, k, v, layout, dropout_p=p)[:, 0]

    def test_rate_and_scale(self) -> None:
        q, k = torch.randn(300, 1, 64), torch.randn(64, 1, 64)
        full, dropped = self.probabilities(0.0, q, k), self.probabilities(self.P, q, k)
        gone = (dropped == 0).double().mean().item()
        deviation = (self.P * (1 - self.P) / dropped.numel()) ** 0.5
        assert abs(gone - self.P) < 5 * deviation
        kept = dropped != 0
        assert torch.allclose(dropped[kept], full[kept] / (1 - self.P), rtol=1e-5)

    def test_the_generator_decides(self) -> None:
        q, k = torch.randn(9, 1, 64), torch.randn(64, 1, 64)
        torch.manual_seed(1)
        first, second = self.probabilities(self.P, q, k), self.probabilities(self.P, q, k)
        torch.manual_seed(1)
        assert torch.equal(self.probabilities(self.P, q, k), first)
        assert not torch.equal(first, second)

    def test_forward_and_backward_use_one_mask(self) -> None:
        """Under a fixed seed the op is an ordinary function: its gradient is the difference."""
        layout = Layout.from_lengths([4, 3], [6], [0, 0])
        inputs = [torch.randn(7, 2, 4), torch.randn(6, 1, 4), torch.randn(6, 1, 4)]
        inputs = [x.double().requires_grad_() for x in inputs]

        def fixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            torch.manual_seed(3)
            return ops.cross_attention(q, k, v, layout, softcap=4.0, dropout_p=self.P)

        assert torch.autograd.gradcheck(fixed, inputs)


def test_stats_are_what_a_backward_needs(on: Any, randn: Callable[..., Tensor]) -> None:
    """The largest score and the sum of exp(score - largest), of one scale on every backend."""
    layout = Layout.from_lengths([3, 40, 1], [100, 0], [0, 0, 1])
    q, k, v = randn(44, 4, 64), randn(100, 2, 64), randn(100, 2, 64)
    settings = (False, 0, 0.125, 5.0, 0.0)
    _, stats = torch.ops.fastvlm.cross_attention(q, k, v, *arguments_of(layout), *settings)
    assert stats[43, :, 0].isneginf().all()
    assert (stats[43, :, 1] == 0).all()
    wide = [x.double() for x in (q, k)]
    scores = [
        5 * torch.tanh(torch.einsum("rhd,khd->rhk", a, b.repeat_interleave(2, 1)) * 0.125 / 5)
        for a, b in (wide, (q.float(), k.float()))
    ]
    largest, total = stats[:43].double().unbind(-1)
    ours = (largest * math.log(2) + total.log()).float()
    exact, theirs = (s[:43].logsumexp(-1) for s in scores)
    error_rule.check("logsumexp", ours, theirs, exact, error_rule.FORWARD)
