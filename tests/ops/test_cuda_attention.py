"""The CUDA attention of a decoding step: lengths around a tile, splits, groups, ancestry, caps."""

from __future__ import annotations

from typing import Any

import cuda_emulator
import plain
import pytest
import torch
from torch import Tensor

from fastvlm import Layout, ops
from fastvlm.cuda import attention
from fastvlm.ops.attention import arguments_of
from fastvlm.ops.dispatch import BackendError
from fastvlm.reference import attention as reference

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("emulated")]
# keys of a tile are 64 (32 where a head has 256): none, one, around a tile, around two
KV = [0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 131, 200]


@pytest.fixture
def emulated(seed: int) -> Any:
    cuda_emulator.reset_counts()
    with cuda_emulator.emulated(cuda_emulator.SCHEDULES[seed % 3], seed):
        yield
    assert cuda_emulator.counts()["bank_conflicts"] == 0


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def splits_are(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    monkeypatch.setattr(attention, "_splits", lambda *args: splits)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("d", attention.HEAD_DIMS)
def test_cross_attention(
    d: int, softcap: float | None, splits: int, randn: Any, follows_the_error_rule: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    splits_are(monkeypatch, splits)
    lengths = [1] * len(KV), KV, list(range(len(KV)))
    layout = Layout.from_lengths(*lengths)
    follows_the_error_rule(
        lambda *x: ops.cross_attention(*x, layout, softcap=softcap),
        lambda *x: plain.attention(*x, *lengths, softcap=softcap),
        [randn(len(KV), 4, d), randn(sum(KV), 2, d), randn(sum(KV), 2, d)],
    )


def test_keys_are_read_once_for_all_beams_and_heads_of_a_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """16 bytes a copy: those of a tile of queries, and those of each key and value once."""
    splits_are(monkeypatch, 1)
    keys, d = 130, 64
    k, v = torch.randn(2, keys, 1, d).bfloat16()
    for beams, group in ((1, 1), (4, 2), (4, 4), (16, 1)):
        q = torch.randn(beams, group, d).bfloat16()
        cuda_emulator.reset_counts()
        ops.cross_attention(q, k, v, Layout.from_lengths([beams], [keys], [0]))
        whole_tiles = -(-keys // 64) * 64
        assert cuda_emulator.counts()["copies"] == (16 + 2 * whole_tiles) * d // 8


# one row and one head; a full tile; a tile and a row; an image nobody reads; rows out of order
READERS = {
    "one": ([1], [70], [0], 1),
    "tile": ([4, 4], [70, 33], [1, 1], 2),
    "more": ([9, 8, 0], [5, 70, 3], [1, 1, 0], 3),
    "order": ([3, 2, 4], [40, 70], [1, 0, 1], 1),
}


@pytest.mark.parametrize("case", list(READERS))
def test_readers(case: str, randn: Any, follows_the_error_rule: Any) -> None:
    *lengths, group = READERS[case]
    layout = Layout.from_lengths(*lengths)
    rows, keys = sum(lengths[0]), sum(lengths[1])
    follows_the_error_rule(
        lambda *x: ops.cross_attention(*x, layout),
        lambda *x: plain.attention(*x, *lengths),
        [randn(rows, 2 * group, 64), randn(keys, 2, 64), randn(keys, 2, 64)],
    )


@pytest.mark.parametrize("splits", [1, 2])
def test_stats_are_those_of_the_reference(
    splits: int, randn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits_are(monkeypatch, splits)
    layout = Layout.from_lengths([1, 2], [0, 90])
    settings = (False, 0, 0.125, 3.0, 0.0)
    q, k, v = randn(3, 2, 64), randn(90, 1, 64), randn(90, 1, 64)
    arguments = (q, k, v, *arguments_of(layout), *settings)
    _, stats = torch.ops.fastvlm.cross_attention(*arguments)
    _, exact = reference.attention(*arguments)
    torch.testing.assert_close(stats, exact, rtol=1e-5, atol=1e-5)


def test_splits_of_more_tiles_than_a_slot_has_counters(
    follows_the_error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits_are(monkeypatch, 2)
    filled, kv_heads = [70, 3, 0], 171
    assert len(filled) * kv_heads > 512  # kArrivals of csrc/cuda/attention.h
    shapes = [(3, kv_heads, 64), (3, 70, kv_heads, 64), (3, 70, kv_heads, 64)]
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]
    follows_the_error_rule(
        lambda *x: ops.cached_attention(*x, torch.tensor(filled)),
        lambda *x: plain.cached_attention(*x, filled),
        inputs,
    )


def test_the_order_in_which_splits_end_changes_no_bit(
    randn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits_are(monkeypatch, 32)
    layout = Layout.from_lengths([5], [700], [0])
    q, k, v = randn(5, 2, 64), randn(700, 1, 64), randn(700, 1, 64)
    cuda_emulator.reset_counts()
    outs = []
    for seed in (1, 2, 3):
        with cuda_emulator.emulated("random", seed):
            outs.append(ops.cross_attention(q, k, v, layout))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    assert cuda_emulator.counts()["launches"] == 3


def test_heads_of_a_wider_tensor(randn: Any, follows_the_error_rule: Any) -> None:
    """As a projection of q, k and v in one leaves them."""
    lengths = [3], [70], [0]
    layout = Layout.from_lengths(*lengths)
    follows_the_error_rule(
        lambda q, kv: ops.cross_attention(q[:, 1:3], kv[:, :2], kv[:, 2:], layout),
        lambda q, kv: plain.attention(q[:, 1:3], kv[:, :2], kv[:, 2:], *lengths),
        [randn(3, 5, 64), randn(70, 4, 64)],
    )


def ancestry_of(rows: int, holders: int, time: int) -> Tensor:
    table = torch.randint(0, holders, (rows, time), dtype=torch.int32)
    return torch.where(torch.rand(rows, time) < 0.1, -1, table).int()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [None, 9, 70])
@pytest.mark.parametrize("beams", [True, False])
@pytest.mark.parametrize("d", attention.HEAD_DIMS)
def test_cached_attention(
    d: int, beams: bool, window: int | None, splits: int, randn: Any, follows_the_error_rule: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    splits_are(monkeypatch, splits)
    filled, time = [0, 1, 64, 65, 150], 150
    table = ancestry_of(len(filled), 6, time) if beams else None
    settings: dict[str, Any] = {"window": window, "softcap": 5.0}
    follows_the_error_rule(
        lambda *x: ops.cached_attention(*x, torch.tensor(filled), ancestry=table, **settings),
        lambda *x: plain.cached_attention(*x, filled, table, **settings),
        [randn(len(filled), 4, d), randn(6, time, 2, d), randn(6, time, 2, d)],
    )


def test_what_is_not_visible_may_hold_anything(randn: Any) -> None:
    """Of the cache beyond the lengths, and where ancestry says no, NaN is not seen."""
    q, cache = randn(2, 2, 64), randn(2, 80, 1, 64)
    table = torch.tensor([[0] * 80, [1] * 80], dtype=torch.int32)
    table[:, 3] = -1
    clean = ops.cached_attention(q, cache, cache, torch.tensor([70, 9]), ancestry=table)
    cache[0, 70:] = float("nan")
    cache[1, 9:] = float("nan")
    cache[:, 3] = float("nan")
    dirty = ops.cached_attention(q, cache, cache, torch.tensor([70, 9]), ancestry=table)
    assert torch.equal(clean, dirty)
    assert clean.isfinite().all()


def test_transformers_cache_layout(randn: Any, follows_the_error_rule: Any) -> None:
    follows_the_error_rule(
        lambda q, k, v: ops.cached_attention(
            q, k.transpose(1, 2), v.transpose(1, 2), torch.tensor([40, 33])
        ),
        lambda q, k, v: plain.cached_attention(q, k.transpose(1, 2), v.transpose(1, 2), [40, 33]),
        [randn(2, 20, 64), randn(2, 1, 40, 64), randn(2, 1, 40, 64)],
    )


def test_offsets_are_counted_in_64_bits(tmp_path: Any) -> None:
    """Cache rows that begin 2^30 elements apart, in a file with holes."""
    stride, time, d = 2**30 + 8, 5, 64
    store = torch.from_file(
        str(tmp_path / "cache"), shared=True, size=2 * stride + time * d, dtype=torch.bfloat16
    )
    cache = store.as_strided((3, time, 1, d), (stride, d, d, 1))
    cache.copy_(torch.randn(3, time, 1, d))
    q, lengths = torch.randn(3, 1, d).bfloat16(), torch.full((3,), time)
    far = ops.cached_attention(q, cache, cache, lengths)
    assert torch.equal(
        far, ops.cached_attention(q, cache.contiguous(), cache.contiguous(), lengths)
    )


CANNOT = {
    "dtype": (torch.float32, 64, 1, {}, "float32"),
    "head": (torch.bfloat16, 80, 1, {}, "head dimension 80"),
    "rows": (torch.bfloat16, 64, 65, {}, "more than 64 query rows"),
    "dropout": (torch.bfloat16, 64, 1, {"dropout_p": 0.5}, "dropout"),
}


@pytest.mark.parametrize("why", list(CANNOT))
def test_what_it_does_not_serve_it_says(why: str) -> None:
    dtype, d, rows, settings, words = CANNOT[why]
    q, k = torch.randn(rows, 1, d).to(dtype), torch.randn(5, 1, d).to(dtype)
    with pytest.raises(BackendError, match=words):
        ops.cross_attention(q, k, k, Layout.from_lengths([rows], [5], [0]), **settings)


def test_heads_between_multiples_of_16_bytes_are_not_served() -> None:
    q, k = torch.randn(1, 1, 64).half(), torch.randn(5, 1, 68).half()[..., 4:]
    with pytest.raises(BackendError, match="heads of k that do not begin"):
        ops.cross_attention(q, k, k, Layout.from_lengths([1], [5], [0]))
