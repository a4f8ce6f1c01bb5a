"""The raw norm kernels against the reference in float64: odd sizes, dtypes, strides, subsets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import error_rule
import pytest
import torch
from torch import Tensor

import fastvlm
from fastvlm import extension
from fastvlm.reference import _random
from fastvlm.reference import norm as reference

ROWS = (0, 1, 9, 70)
WIDTHS = (1, 3, 17, 63, 100, 768, 2305)
EPS = 1e-5
# how many results may be asked of the backward of each op
RESULTS = {"rms_norm": 2, "residual_rms_norm": 5, "residual_layer_norm": 4}


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not extension.available():
        pytest.skip(f"no CPU extension: {extension.reason()}")


@pytest.fixture(params=[None, torch.float32, torch.bfloat16], ids=["same", "fp32", "bf16"])
def weight_dtype(request: pytest.FixtureRequest, dtype: torch.dtype) -> torch.dtype:
    """Of the weights, where rows are of `dtype`."""
    return request.param or dtype


def op(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.fastvlm, name)


def raw(name: str, *args: Any) -> Any:
    return getattr(torch.ops.fastvlm_cpu, name)(*args)


def inputs(
    name: str, rows: int, n: int, dtype: torch.dtype, weights: torch.dtype, p: float = 0.0
) -> tuple[list[Any], list[Any]]:
    """Arguments of forward and of backward; the last of backward's, what is wanted, is left out."""

    def row() -> Tensor:
        return torch.randn(rows, n).to(dtype)

    def vector(size: int = n) -> Tensor:
        return torch.randn(size).to(weights)

    x, residual, grad, weight = row(), row(), row(), vector()
    # one number over itself is 1, and its gradient nothing but rounding, unless eps counts
    eps = 0.1 if n == 1 else EPS
    if name == "rms_norm":
        return [x, weight, eps, 1.0], [grad, x, weight, eps, 1.0]
    if name == "residual_rms_norm":
        vectors = [weight, vector(1), vector()]
        forward = [x, residual, *vectors, eps, 1.0]
        return forward, [grad, row(), x, row(), *vectors, eps, 1.0]
    seed = torch.tensor([-77]) if p else None
    forward = [x, residual, weight, vector(), seed, eps, p]
    return forward, [grad, x, residual, weight, seed, eps, p]


def wide(args: list[Any]) -> list[Any]:
    floats = (isinstance(x, Tensor) and x.is_floating_point() for x in args)
    return [x.double() if is_float else x for x, is_float in zip(args, floats)]


def listed(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


class Results:
    """Results of several calls by name, held to the error rule at once."""

    def __init__(self) -> None:
        self.parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(self, name: str, args: list[Any]) -> None:
        """What the kernel that serves fastvlm::name gives; the reference rounds as PyTorch does."""
        with fastvlm.use("cpu"):
            ours = listed(op(name)(*args))
        formula = getattr(reference, name)
        triples = zip(ours, listed(formula(*args)), listed(formula(*wide(args))), strict=True)
        for i, (a, b, c) in enumerate(triples):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{name}, result {i}"
            assert a.is_contiguous()
            part = (a.flatten(), b.flatten(), c.flatten())
            self.parts.setdefault(f"{name}, result {i}", []).append(part)

    def check(self) -> None:
        for name, parts in self.parts.items():
            factor = error_rule.BACKWARD if "backward" in name else error_rule.FORWARD
            ours, torchs, exact = (torch.cat(part) for part in zip(*parts))
            error_rule.check(name, ours, torchs, exact, factor)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("name", list(RESULTS))
def test_numbers(name: str, n: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    results = Results()
    # a gate has one gradient for each call: of a few of them PyTorch's may be right by luck
    for rows in 8 * (ROWS if n < 768 else ROWS[:-1]):
        forward, backward = inputs(name, rows, n, dtype, weight_dtype)
        results.add(name, forward)
        results.add(f"{name}_backward", [*backward, [True] * RESULTS[name]])
    results.check()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("has_h", "has_y"), [(True, False), (False, True), (False, False)])
def test_a_gradient_that_is_missing_counts_as_zero(has_h: bool, has_y: bool) -> None:
    results = Results()
    for has_gate, has_next in itertools.product((True, False), repeat=2):
        _, args = inputs("residual_rms_norm", 9, 100, torch.float32, torch.float32)
        args[0] = args[0] if has_h else None
        args[1] = args[1] if has_y and has_next else None
        args[5] = args[5] if has_gate else None
        args[6] = args[6] if has_next else None
        results.add("residual_rms_norm_backward", [*args, [True] * 5])
    results.check()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", list(RESULTS))
def test_any_part_of_the_gradients(name: str, dtype: torch.dtype) -> None:
    """The same bits whatever else is wanted; what is not comes back as the reference gives it."""
    _, args = inputs(name, 40, 33, dtype, torch.float32, p=0.4)
    backward, count = f"{name}_backward", RESULTS[name]
    with fastvlm.use("cpu"):
        everything = op(backward)(*args, [True] * count)
        for needs in itertools.product((True, False), repeat=count):
            got = op(backward)(*args, list(needs))
            expected = getattr(reference, backward)(*args, list(needs))
            for need, a, b, full in zip(needs, got, expected, everything, strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                assert not need or torch.equal(a, full)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", list(RESULTS))
def test_rows_and_weights_of_larger_tensors(name: str, dtype: torch.dtype) -> None:
    """Any strides give the bits of contiguous arguments: columns cut out, rows repeated, steps."""

    def contiguous(x: Tensor) -> Tensor:
        return x.contiguous()

    def cut(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0]
        larger = torch.full((2 * x.shape[0], x.shape[1] + 9), torch.nan).to(x.dtype)
        larger[::2, 5 : 5 + x.shape[1]] = x
        return larger[::2, 5 : 5 + x.shape[1]]

    def by_columns(x: Tensor) -> Tensor:
        return x.T.contiguous().T if x.dim() == 2 else x

    def result(which: str, args: list[Any], layout: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return listed(op(which)(*(layout(x) if torch.is_tensor(x) else x for x in args)))

    forward, backward = inputs(name, 13, 101, dtype, torch.float32)
    backward[0] = backward[0][:1].expand(13, -1)  # as the gradient of a sum over rows
    calls = [(name, forward), (f"{name}_backward", [*backward, [True] * RESULTS[name]])]
    with fastvlm.use("cpu"):
        for which, args in calls:
            expected = result(which, args, contiguous)
            for layout in (lambda x: x, cut, by_columns):
                for a, b in zip(result(which, args, layout), expected, strict=True):
                    assert torch.equal(a, b)


@pytest.mark.parametrize(("rows", "n"), [(100_000, 33), (300_000, 5)])
def test_weight_gradients_of_many_rows(rows: int, n: int) -> None:
    """All of one sign, so that nothing cancels: one long float32 sum is off by several eps."""
    x, grad = (torch.randn(rows, n).abs() + 0.1 for _ in range(2))
    weight = torch.randn(n)

    def gradients(cast: torch.dtype) -> list[Tensor]:
        g, rows, w = (t.to(cast) for t in (grad, x, weight))
        no = [False] * 4
        rms = op("rms_norm_backward")(g, rows, w, EPS, 1.0, [False, True])
        residual = op("residual_rms_norm_backward")(
            None, g, rows, rows, w, None, w, EPS, 1.0, [*no, True]
        )
        layer = op("residual_layer_norm_backward")(
            g, rows, rows, w, None, EPS, 0.0, [*no[:3], True]
        )
        return [rms[1], residual[4], layer[3]]

    with fastvlm.use("cpu"):
        ours = gradients(torch.float32)
    for got, want in zip(ours, gradients(torch.float64), strict=True):
        assert ((got - want).abs() <= torch.finfo(torch.float32).eps * want.abs()).all()


@pytest.mark.parametrize("n", [3, 17, 768])
@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_layer_norm_next_to_a_large_mean(n: int, offset: float) -> None:
    results = Results()
    forward, backward = inputs("residual_layer_norm", 50, n, torch.float32, torch.float32)
    forward[0] += offset
    backward[1] += offset
    results.add("residual_layer_norm", forward)
    results.add("residual_layer_norm_backward", [*backward, [True] * 4])
    results.check()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.97])
def test_dropout_is_the_references(p: float, dtype: torch.dtype) -> None:
    rows, n = 150, 77
    results = Results()
    forward, backward = inputs("residual_layer_norm", rows, n, dtype, dtype, p)
    results.add("residual_layer_norm", forward)
    results.add("residual_layer_norm_backward", [*backward, [True] * 4])
    results.check()
    kept = _random.elementwise(forward[4], forward[0], p, torch.float32) > 0
    args = [*backward, True, True, False, False]
    dx, dresidual, *_ = raw("residual_layer_norm_backward", *args)
    assert torch.equal(dx != 0, kept & (dresidual != 0))
    scaled = dresidual.double()[kept] / (1 - p)
    assert torch.allclose(dx.double()[kept], scaled, rtol=3 * torch.finfo(dtype).eps, atol=1e-7)


def test_an_element_is_kept_from_exactly_its_own_rate_on() -> None:
    """uniform >= p, to the last of 53 bits."""
    seed, counter = torch.tensor([12345]), torch.arange(32)
    z, weight = torch.randn(1, 32), torch.ones(32)
    for i, u in enumerate(_random.uniform(seed, counter).tolist()):
        for p, keeps in ((u, True), (u + 2.0**-53, False)):
            args = (z.sin(), z, z.cos(), weight, seed, EPS, p, True, False, False, False)
            dx = raw("residual_layer_norm_backward", *args)[0]
            assert bool(dx[0, i] != 0) == keeps


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("rows", "n"), [(5000, 33), (90, 2305), (40_000, 1)])
@pytest.mark.parametrize("name", list(RESULTS))
def test_any_number_of_threads_gives_the_same_bits(
    name: str, rows: int, n: int, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    forward, backward = inputs(name, rows, n, dtype, torch.float32, p=0.2)

    def run() -> list[Tensor]:
        with fastvlm.use("cpu"):
            grads = op(f"{name}_backward")(*backward, [True] * RESULTS[name])
            return [*listed(op(name)(*forward)), *grads]

    threads(1)
    expected = run()
    for count in (2, 7):
        threads(count)
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b), f"{count} threads"


def test_the_next_norm_reads_h_as_stored() -> None:
    forward, _ = inputs("residual_rms_norm", 30, 100, torch.bfloat16, torch.float32)
    h, y = raw("residual_rms_norm", *forward)
    assert torch.equal(y, raw("rms_norm", h, forward[4], EPS, 1.0))


def test_memory_is_guarded() -> None:
    x, w, seed = torch.randn(3, 8), torch.randn(8), torch.tensor([1])
    layer_norm = (x, x, w, w)
    for name, args, message in (
        ("rms_norm", (x.T, w, EPS, 1.0), "x: the last dimension must be contiguous"),
        ("rms_norm", (x[0], w, EPS, 1.0), "x: expected 2 dimensions"),
        ("rms_norm", (x.double(), w, EPS, 1.0), "x: expected float32"),
        ("rms_norm", (x, w[:7], EPS, 1.0), "weight: expected 8 elements"),
        ("rms_norm", (x, w[::2], EPS, 1.0), "weight: the last dimension must be contiguous"),
        ("rms_norm", (x, w.double(), EPS, 1.0), "weight: expected float32"),
        ("rms_norm_backward", (x[:2], x, w, EPS, 1.0, True, True), "grad: expected the shape"),
        ("rms_norm_backward", (x.half(), x, w, EPS, 1.0, True, True), "grad: expected the dtype"),
        ("residual_rms_norm", (x, x[:, :7], w, None, None, EPS, 1.0), "residual: expected the sh"),
        ("residual_rms_norm", (x, x, w, w, None, EPS, 1.0), "gate: expected one number"),
        ("residual_rms_norm", (x, x, w, None, w[:7], EPS, 1.0), "next_weight: expected 8 elem"),
        (
            "residual_rms_norm_backward",
            (None, x, x, x, w, None, None, EPS, 1.0, *[True] * 5),
            "grad_y: needs next_weight",
        ),
        (
            "residual_rms_norm_backward",
            (x, None, x, x[:1], w, None, None, EPS, 1.0, *[True] * 5),
            "h: expected the shape",
        ),
        ("residual_layer_norm", (x, x, w, w[:7], None, EPS, 0.0), "bias: expected 8 elements"),
        ("residual_layer_norm", (*layer_norm, seed.int(), EPS, 0.5), "seed: expected one int64"),
        ("residual_layer_norm", (*layer_norm, seed.expand(2), EPS, 0.5), "seed: expected one int"),
        ("residual_layer_norm", (*layer_norm, seed, EPS, 1.0), "dropout_p: expected"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw(name, *args)
