"""What test_attention.py does not reach on the Triton backend.

True blocks of every family, dropout with all its company, splits of long keys, wide strides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import emulator
import plain
import pytest
import torch
from torch import Tensor

from fastvlm import Layout, ops
from fastvlm.ops import attention as public
from fastvlm.reference._random import keep_scale
from fastvlm.triton import configs

pytest.importorskip("triton")
from fastvlm.triton import attention

pytestmark = pytest.mark.triton
CROSS = ([9, 0, 14, 3], [40, 7, 70], [2, 0, 2, 1])
OWN = ([33, 1, 17],) * 2 + ([0, 1, 2],)
SEED = torch.tensor([12345])


def cross(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    return ops.cross_attention(q, k, v, Layout.from_lengths(*CROSS), **settings)


def own(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    return ops.self_attention(q, k, v, Layout.from_lengths(OWN[0]), **settings)


def leaves(
    randn: Callable[..., Tensor], lengths: Any, heads: tuple[int, int], d: int
) -> list[Tensor]:
    rows, keys = sum(lengths[0]), sum(lengths[1])
    shapes = [(rows, heads[0], d), (keys, heads[1], d), (keys, heads[1], d)]
    return [randn(*shape, grad=True) for shape in shapes]


@pytest.fixture
def emulated() -> Iterator[None]:
    with emulator.emulated():
        yield


@pytest.mark.parametrize("option", [0, 1])
@pytest.mark.parametrize("family", configs.FAMILIES)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_true_blocks(
    d: int, family: str, option: int, randn: Any, follows_the_error_rule: Any
) -> None:
    with emulator.emulated(small=False), configs.assumed(family, option):
        follows_the_error_rule(
            lambda *x: cross(*x, softcap=5.0),
            lambda *x: plain.attention(*x, *CROSS, softcap=5.0),
            leaves(randn, CROSS, (2, 1), d),
        )


def dropped(
    q: Tensor, k: Tensor, v: Tensor, lengths: Any, p: float, cap: float, causal: bool, window: int
) -> Tensor:
    """Plain attention whose probabilities meet the reference's mask, one segment at a time."""
    group, out, first, heads = q.shape[1] // k.shape[1], [], 0, torch.arange(q.shape[1])
    images = list(zip(k.split(lengths[1]), v.split(lengths[1])))
    for rows, image in zip(q.split(lengths[0]), lengths[2]):
        keys, values = (x.repeat_interleave(group, 1) for x in images[image])
        s = torch.einsum("rhd,khd->rhk", rows, keys) * q.shape[-1] ** -0.5
        s = cap * torch.tanh(s / cap)
        place, key = torch.arange(rows.shape[0]), torch.arange(keys.shape[0])
        away = (place[:, None] - key)[:, None]
        if causal:
            s = s.masked_fill(away < 0, float("-inf"))
        if window:
            s = s.masked_fill(away.abs() >= window, float("-inf"))
        row = first + place
        counter = ((row[:, None] * q.shape[1] + heads) << 32)[..., None] + key
        kept = s.softmax(-1) * keep_scale(SEED, counter, p, s.dtype)
        out.append(torch.einsum("rhk,khd->rhd", kept, values))
        first += rows.shape[0]
    return torch.cat(out)


SETTINGS = {
    "cross": (cross, CROSS, {}),
    "causal": (own, OWN, {"causal": True}),
    "window": (own, OWN, {"causal": True, "window": 7}),
    "both-ways": (own, OWN, {"causal": False, "window": 9}),
}


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=["gqa", "mha"])
@pytest.mark.parametrize("kind", list(SETTINGS))
def test_dropout_draws_the_mask_of_the_reference(
    kind: str,
    heads: tuple[int, int],
    randn: Any,
    follows_the_error_rule: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a softcap besides, and readers of an image that do not stand together."""
    monkeypatch.setattr(public, "seed_for", lambda q, p: SEED if p else None)
    run, lengths, settings = SETTINGS[kind]
    causal, window = settings.get("causal", False), settings.get("window", 0)
    follows_the_error_rule(
        lambda *x: run(*x, softcap=5.0, dropout_p=0.3, **settings),
        lambda *x: dropped(*x, lengths, 0.3, 5.0, causal, window),
        leaves(randn, lengths, heads, 48),
    )


@pytest.mark.parametrize("keys", [1, 63, 64, 129, 700])
@pytest.mark.parametrize("readers", [1, 5])
def test_few_rows_split_the_keys(
    keys: int, readers: int, randn: Any, follows_the_error_rule: Any
) -> None:
    """True blocks; the second image has no token, the third one."""
    lengths = ([1] * readers + [1, 1], [keys, 0, 1], [0] * readers + [1, 2])
    layout = Layout.from_lengths(*lengths)
    with emulator.emulated(small=False) as session, torch.no_grad():
        follows_the_error_rule(
            lambda *x: ops.cross_attention(*x, layout),
            lambda *x: plain.attention(*x, *lengths),
            [x.detach() for x in leaves(randn, lengths, (4, 2), 64)],
        )
        # the parts of split keys are put together by a launch of their own
        assert session.launches == (1 if keys < 128 else 2)


def test_splits_are_few_where_there_is_work_enough() -> None:
    q = torch.empty(1, 1, 64)
    assert attention._splits(q, programs=1024, keys=4096) == 1
    assert attention._splits(q, programs=4, keys=577) == 8
    assert attention._splits(q, programs=4, keys=100) == 1
    assert attention._splits(q, programs=1, keys=10**6) == attention.MOST_SPLITS


@pytest.mark.usefixtures("emulated")
def test_an_image_with_nothing_but_masked_rows_and_a_cache_that_holds_anything(randn: Any) -> None:
    cache = randn(3, 40, 1, 16)
    cache[0, 30:] = cache[1] = cache[2, 1:] = float("nan")
    lengths = torch.tensor([30, 0, 1])
    out = ops.cached_attention(randn(3, 2, 16), cache, cache, lengths)
    assert out.isfinite().all()
    assert (out[1] == 0).all()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_beyond_all_counting_is_none(
    causal: bool, randn: Any, follows_the_error_rule: Any
) -> None:
    for window in (2**31 - 1, 2**62):
        follows_the_error_rule(
            lambda *x, w=window: own(*x, causal=causal, window=w),
            lambda *x: plain.attention(*x, *OWN, causal=causal),
            leaves(randn, OWN, (2, 1), 16),
        )


@pytest.mark.parametrize(
    ("why", "change"),
    [("head dimension 257", {"d": 257}), ("float64", {"dtype": torch.float64})],
)
def test_what_it_does_not_serve_it_says(why: str, change: dict[str, Any]) -> None:
    shape, dtype = (51, 2, change.get("d", 16)), change.get("dtype", torch.float32)
    x = torch.zeros(shape, dtype=dtype)
    with emulator.emulated(), pytest.raises(RuntimeError, match=why):
        own(x, x, x)
