"""The raw CPU kernels against float64, at sizes that are multiples of nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import error_rule
import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm import extension
from fastvlm.reference.mlp import ACTIVATIONS

ROWS = (0, 1, 3, 7, 8, 16, 17, 31, 33, 70, 129, 200)
# the last ones in whole tiles of bfloat16, which CPUs with AMX multiply
TILES = [(32, 32), (96, 64), (33, 96), (47, 64), (513, 160)]
SIZES = [(1, 577), (17, 1), (63, 100), (100, 63), (577, 17), (100, 768), (48, 2305), *TILES]


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not extension.available():
        pytest.skip(f"no CPU extension: {extension.reason()}")


def raw() -> torch._ops._OpNamespace:
    return torch.ops.fastvlm_cpu


class Results:
    """What several calls gave, held to the error rule at once.

    One output alone says nothing: PyTorch's may be right by luck.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, ours: Tensor, formula: Callable[..., Tensor], *inputs: Tensor | None) -> None:
        exact = formula(*(None if x is None else x.double() for x in inputs))
        assert ours.shape == exact.shape
        self.parts.append((ours.flatten(), formula(*inputs).flatten(), exact.flatten()))

    def check(self, name: str) -> None:
        ours, torchs, exact = (torch.cat(part) for part in zip(*self.parts))
        error_rule.check(name, ours, torchs, exact, error_rule.FORWARD)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def offsets(lengths: list[int]) -> Tensor:
    return int32(list(accumulate(lengths, initial=0)))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_linear(n: int, k: int, dtype: torch.dtype, randn: Callable[..., Tensor]) -> None:
    results = Results()
    for rows in ROWS:
        x, weight, bias = randn(rows, k), randn(n, k, scale=k**-0.5), randn(n)
        results.add(raw().linear(x, weight, bias), F.linear, x, weight, bias)
        results.add(raw().linear(x, weight, None), F.linear, x, weight)
    results.check("linear")


@pytest.mark.usefixtures("poison")
def test_linear_takes_rows_of_a_larger_tensor(dtype: torch.dtype, randn: Callable) -> None:
    results = Results()
    x, weight = randn(7, 300)[::2, 5:105], randn(90, 200, scale=0.1)[1::3, 50:150]
    results.add(raw().linear(x, weight, None), F.linear, x, weight)
    results.check("linear")


def test_linear_of_float_rows_and_a_bfloat16_weight() -> None:
    x, weight = torch.randn(5, 100), torch.randn(63, 100).bfloat16()
    ours = raw().linear(x, weight, None)
    exact = x.double() @ weight.double().T
    error_rule.check("linear", ours, F.linear(x, weight.float()), exact, error_rule.FORWARD)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_linear_with_an_int8_weight(n: int, k: int, dtype: torch.dtype, randn: Callable) -> None:
    results = Results()
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scale = torch.rand(n) * k**-0.5 / 64
    exact = weight.double() * scale.double()[:, None]

    def formula(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, exact.to(x.dtype), bias)

    for rows in ROWS:
        x, bias = randn(rows, k), randn(n)
        results.add(raw().low_precision_linear(x, weight, scale, bias), formula, x, bias)
        results.add(raw().low_precision_linear(x, weight, scale, None), formula, x)
    results.check("low_precision_linear")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("hidden", "k"), SIZES)
def test_mlps(hidden: int, k: int, activation: str, dtype: torch.dtype, randn: Callable) -> None:
    number = ACTIVATIONS.index(activation)

    def gelu_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(plain.activated(F.linear(x, w1, b1), activation), w2, b2)

    def geglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gates = plain.activated(F.linear(x, gate), activation)
        return F.linear(gates * F.linear(x, up), down)

    gelu, geglu = Results(), Results()
    for rows in ROWS:
        x, w1, b1 = randn(rows, k), randn(hidden, k, scale=k**-0.5), randn(hidden)
        up = randn(hidden, k, scale=k**-0.5)
        w2, b2 = randn(100, hidden, scale=hidden**-0.5), randn(100)
        gelu.add(raw().gelu_mlp(x, w1, b1, w2, b2, number), gelu_mlp, x, w1, b1, w2, b2)
        geglu.add(raw().geglu_mlp(x, w1, up, w2, number), geglu_mlp, x, w1, up, w2)
    gelu.check("gelu_mlp")
    geglu.check("geglu_mlp")


@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_keeps_its_tails_and_nan(tanh: bool) -> None:
    x = torch.cat([torch.linspace(-14, 14, 20001), torch.tensor([float("nan"), 1e30, -1e30])])
    one = torch.ones(1, 1)
    ours = raw().gelu_mlp(x[:, None], one, None, one, None, int(tanh))[:, 0]
    z = x.double()
    inner = (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
    exact = z * torch.sigmoid(2 * inner) if tanh else z * torch.special.erfc(-z / 2**0.5) / 2
    assert ours[-3].isnan()
    assert ours[-2:].tolist() == x[-2:].clamp(min=0).tolist()
    finite = exact.isfinite() & (exact.abs() > 1e-30)
    # relative: 1 + erf(x) would have lost every digit of the tail; exp(-x^2 / 2) loses x^2 / 2 ulp
    error = ((ours.double() - exact).abs() / exact.abs())[finite]
    assert (error < 2e-7 * (4 + z[finite].abs() ** (3 if tanh else 2))).all()


# q lengths, kv lengths, image_of: readers apart from each other, empty segments and images,
# images nobody reads, few rows and many
LAYOUTS = {
    "decode": ([1, 1, 1, 1, 1, 1], [100, 577, 3], [0, 1, 0, 1, 1, 1]),
    "captions": ([40, 0, 7, 133, 1], [65, 17, 64], [2, 0, 0, 2, 2]),
    "empty": ([3, 0, 30, 2], [0, 63, 1, 0], [0, 1, 0, 2]),
    "no rows": ([0, 0], [5, 0], [0, 1]),
}
HEADS = [(3, 3, 64), (6, 2, 96), (4, 1, 128), (2, 2, 256), (4, 2, 17)]


def logsumexp(q: Tensor, k: Tensor, layout: tuple, scale: float, softcap: float) -> Tensor:
    group, parts = q.shape[1] // k.shape[1], []
    images = k.split(layout[1])
    for rows, image in zip(q.split(layout[0]), layout[2]):
        scores = torch.einsum("qhd,khd->qhk", rows, images[image].repeat_interleave(group, 1))
        scores = scores * scale
        parts.append((softcap * torch.tanh(scores / softcap) if softcap else scores).logsumexp(-1))
    return torch.cat(parts)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize("case", LAYOUTS)
def test_attention_over_images(
    case: str,
    heads: int,
    kv_heads: int,
    dim: int,
    softcap: float,
    dtype: torch.dtype,
    randn: Callable,
) -> None:
    q_lengths, kv_lengths, image_of = layout = LAYOUTS[case]
    q = randn(sum(q_lengths), heads, dim + 5, scale=2.0)[..., 5:]
    k = randn(sum(kv_lengths), kv_heads, dim)
    v = randn(kv_heads, sum(kv_lengths), dim).transpose(0, 1)
    scale = dim**-0.5
    where = offsets(q_lengths), offsets(kv_lengths), int32(image_of)
    arguments = (*where, None, scale, softcap, False, 0, 0.0)
    ours, stats = raw().attention(q, k, v, *arguments, None)
    again, stats_again = raw().attention(q, k, v, *arguments, None)
    assert torch.equal(ours, again)
    assert torch.equal(stats, stats_again)
    largest, total = stats.double().unbind(-1)
    lse = (largest * math.log(2) + total.log()).float()

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain.attention(q, k, v, *layout, scale=scale, softcap=softcap or None)

    results = Results()
    results.add(ours, formula, q, k, v)
    results.check("out")
    expected = logsumexp(q.double(), k.double(), layout, scale, softcap)
    torchs = logsumexp(q.float(), k.float(), layout, scale, softcap)
    assert torch.equal(lse.isinf(), expected.isinf())
    seen = expected.isfinite()
    error_rule.check("lse", lse[seen], torchs[seen], expected[seen], error_rule.FORWARD)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("window", [0, 1, 9, 70])
@pytest.mark.parametrize("causal", [True, False])
def test_self_attention(causal: bool, window: int, dtype: torch.dtype, randn: Callable) -> None:
    lengths = [5, 0, 1, 64, 150, 17]
    segments = list(range(len(lengths)))
    q, k, v = (randn(sum(lengths), h, 64) for h in (4, 2, 2))

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain.attention(
            q, k, v, lengths, lengths, segments, causal=causal, window=window or None
        )

    where = offsets(lengths), offsets(lengths), int32(segments)
    results = Results()
    results.add(
        raw().attention(q, k, v, *where, None, 0.125, 0.0, causal, window, 0.0, None)[0],
        *(formula, q, k, v),
    )
    results.check("self attention")


def gathered(
    q: Tensor, k: Tensor, v: Tensor, positions: list[list[tuple[int, int]]], cap: float
) -> Tensor:
    """Attention of each row over its (cache row, position) pairs, one row at a time."""
    group, out = q.shape[1] // k.shape[2], torch.zeros_like(q)
    for r, pairs in enumerate(positions):
        if pairs:
            rows, times = (list(x) for x in zip(*pairs))
            keys, values = (x[rows, times].repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("hd,thd->ht", q[r], keys) * q.shape[-1] ** -0.5
            scores = cap * torch.tanh(scores / cap) if cap else scores
            out[r] = torch.einsum("ht,thd->hd", scores.softmax(-1), values)
    return out


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("with_ancestry", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_cached_attention(
    heads: int,
    kv_heads: int,
    dim: int,
    with_ancestry: bool,
    window: int,
    dtype: torch.dtype,
    randn: Callable,
) -> None:
    lengths, time, cache_rows = [0, 1, 63, 600, 512, 17], 601, 7
    q = randn(len(lengths), heads, dim)
    k = randn(cache_rows, kv_heads, time, dim).transpose(1, 2)  # as transformers keeps it
    v = randn(cache_rows, time, kv_heads, dim)
    ancestry = torch.randint(-1, cache_rows, (time, len(lengths)), dtype=torch.int32).T
    table = ancestry.tolist() if with_ancestry else [[r] * time for r in range(len(lengths))]
    positions = [
        [
            (table[r][t], t)
            for t in range(max(0, n - window) if window else 0, n)
            if table[r][t] >= 0
        ]
        for r, n in enumerate(lengths)
    ]
    softcap = 30.0 if window else 0.0
    ours = raw().cached_attention(
        *(q, k, v, int32(lengths), ancestry if with_ancestry else None),
        *(dim**-0.5, softcap, window, None),
    )
    results = Results()
    results.add(ours, lambda q, k, v: gathered(q, k, v, positions, softcap), q, k, v)
    results.check("cached attention")


def test_memory_is_guarded() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    with pytest.raises(RuntimeError, match="does not fit"):
        raw().linear(x, weight[:, :7], None)
    with pytest.raises(RuntimeError, match="contiguous"):
        raw().linear(x, torch.randn(8, 10)[:, ::2].T, None)
    for bytes, scale, message in (
        (weight, torch.ones(5), "expected int8"),
        (weight[:, :7].to(torch.int8), torch.ones(5), "does not fit"),
        (weight.to(torch.int8), torch.ones(4), "scale: expected 5 elements"),
        (weight.to(torch.int8), torch.ones(10)[::2], "contiguous"),
        (weight.to(torch.int8), None, "float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw().low_precision_linear(x, bytes, scale, None)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        raw().linear(x.double(), weight, None)
    q = torch.randn(2, 1, 8)
    for q_ends, kv_ends, image, message in (
        ([0, 3], [0, 2], [0], "q_offsets"),
        ([0, 2], [0, 3], [0], "kv_offsets"),
        ([0, 2], [0, 2], [1], "no image 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw().attention(
                *(q, q, q, int32(q_ends), int32(kv_ends), int32(image)),
                *(None, 1.0, 0.0, False, 0, 0.0, None),
            )
    cache = torch.randn(2, 4, 1, 8)
    with pytest.raises(RuntimeError, match="lengths: 5"):
        raw().cached_attention(q, cache, cache, int32([1, 5]), None, 1.0, 0.0, 0, None)
    ancestry = torch.full((2, 4), 2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="ancestry"):
        raw().cached_attention(q, cache, cache, int32([1, 1]), ancestry, 1.0, 0.0, 0, None)
    for bias in (torch.randn(2, 5), torch.randn(1, 4), torch.randn(1, 5).half(), torch.randn(5)):
        with pytest.raises(RuntimeError, match="position_bias"):
            raw().cached_attention(q, cache, cache, int32([1, 1]), None, 1.0, 0.0, 0, bias)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("laid", ["x", "weight", "both"])
def test_many_rows_of_a_transpose(laid: str, dtype: torch.dtype) -> None:
    """x and the weight as a backward pass has them, from inside a larger matrix."""

    def operand(rows: int, cols: int, transposed: bool) -> Tensor:
        if not transposed:
            return torch.randn(rows, cols, dtype=dtype)
        return torch.randn(cols, rows + 3, dtype=dtype)[:, 1:-2].t()

    found = Results()
    for rows, depth, cols in ((65, 1, 1), (193, 17, 130), (385, 300, 15), (70, 513, 257)):
        x = operand(rows, depth, laid != "weight")
        weight = operand(cols, depth, laid != "x") * depth**-0.5
        assert (weight.stride(0) == 1) == (laid != "x" or depth == 1)
        residual = torch.randn(rows, cols, dtype=dtype)
        out = raw().packed_linear(x, weight, None, residual, None)
        found.add(out, lambda x, w, r: r + F.linear(x, w), x, weight, residual)
        second = operand(33, cols, laid != "x")
        out = raw().packed_mlp(x, weight, None, second, None, None, None, 0)
        found.add(out, lambda x, w, v: F.linear(F.gelu(F.linear(x, w)), v), x, weight, second)
    found.check(f"packed products, {laid} transposed")
