"""int8_linear and int8_gelu_mlp against their reference, and against the product they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import error_rule
import pytest
import torch
import torch.nn.functional as F
from plain import activated
from torch import Tensor

import fastvlm
from fastvlm import extension, ops
from fastvlm.reference import int8 as reference
from fastvlm.reference.mlp import ACTIVATIONS

# rows, input, output: odd on purpose; whole groups and panels, and what is left behind them
SHAPES = {
    "one": (1, 577, 100),
    "seven": (7, 64, 128),
    "narrow": (5, 1, 3),
    "groups": (13, 130, 577),
    "blocks": (390, 300, 140),
    "many": (1600, 100, 33),
    "empty": (0, 17, 3),
    "no input": (3, 0, 5),
    "no output": (3, 5, 0),
}
BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    # rows of very different sizes: one factor for all of them would show
    sizes = torch.logspace(-1, 1, n)[:, None] if n else torch.ones(0, 1)
    return ops.quantize_rows(torch.randn(n, k) * max(k, 1) ** -0.5 * sizes)


def rows(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Of very different sizes, with a channel that is much larger than its neighbours."""
    x = torch.randn(m, k) * torch.logspace(-2, 2, m)[:, None] if m else torch.randn(0, k)
    x[:, k // 2 : k // 2 + 1] *= 30
    return x.to(dtype)


def quantized(x: Tensor) -> Tensor:
    """What x is taken for, in float64."""
    whole, factors = reference.quantize_groups(x)
    return (whole.double() * factors.double()[:, :, None]).flatten(1)[:, : x.shape[1]]


def exact(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    wide = w.double() * scale.double()[:, None]
    return F.linear(quantized(x), wide, None if bias is None else bias.double())


@pytest.mark.parametrize("ends", ["", "bias", "bias residual factors", "residual"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_product(shape: str, ends: str, dtype: torch.dtype, on: Callable[..., Any]) -> None:
    m, k, n = SHAPES[shape]
    w, scale = weight(n, k)
    x, bias = rows(m, k, dtype), torch.randn(n, dtype=dtype) if "bias" in ends else None
    # a residual of another dtype: the sum has its
    residual = torch.randn(m, n) if "residual" in ends else None
    factors = torch.rand(max(1, m)) if "factors" in ends else None
    if factors is not None and m == 0:
        factors = torch.rand(1)
    ours = on(ops.int8_linear, x, w, scale, bias, residual, factors=factors)
    plain = reference.int8_linear(x, w, scale, bias, residual, factors)
    want = exact(x, w, scale, bias)
    if factors is not None:
        want = want * factors.double().repeat_interleave(m // factors.numel())[:, None]
    want = want if residual is None else residual.double() + want
    # each row by itself: the largest would hide what is wrong with the others
    assert ours.shape == want.shape
    for row in range(0, m, max(1, m // 7)):
        error_rule.check(f"row {row}", ours[row], plain[row], want[row], error_rule.FORWARD)


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "silu", "gelu"])
@pytest.mark.parametrize("shape", [(5, 17, 40, 9), (200, 100, 300, 65), (1600, 70, 130, 40)])
def test_mlp_between_two_quantizations(
    shape: tuple[int, ...], activation: str, dtype: torch.dtype, on: Callable[..., Any]
) -> None:
    """A rounding before the second quantization moves an integer by one: the whole MLP is compared
    by what quantization costs, in ours and in plain PyTorch."""
    m, k, f, n = shape
    (w1, s1), (w2, s2) = weight(f, k), weight(n, f)
    x, residual = torch.randn(m, k).to(dtype), torch.randn(m, n)
    b1, b2 = torch.randn(f), torch.randn(n).to(dtype)
    factors = torch.rand(m // 5 if m % 5 == 0 else 1)
    arguments = (x, w1, s1, b1, w2, s2, b2, residual)
    ours = on(ops.int8_gelu_mlp, *arguments, activation=activation, factors=factors)
    plain = reference.int8_gelu_mlp(*arguments, factors, ACTIVATIONS.index(activation))
    hidden = activated(exact(x, w1, s1, b1), activation)
    branch = F.linear(hidden, w2.double() * s2.double()[:, None], b2.double())
    each = factors.double().repeat_interleave(m // factors.numel())[:, None]
    error_rule.check("mlp", ours, plain, residual.double() + each * branch, error_rule.FORWARD)


def whole_numbers(m: int, k: int, most: int) -> Tensor:
    """Integers of which every group has its largest, 127: quantized they are themselves."""
    x = torch.randint(-most, most + 1, (m, k)).float()
    x[:, ::64] = 127
    return x


@pytest.mark.parametrize("quads", [False, True])
@pytest.mark.parametrize("shape", [(6, 64, 130, 40), (195, 130, 200, 17), (900, 65, 190, 70)])
def test_every_element_is_where_it_belongs(shape: tuple[int, ...], quads: bool) -> None:
    """Where nothing is rounded both ways of multiplying are exact: the layouts of either, and what
    is subtracted where x has no sign."""
    if not extension.available():
        pytest.skip(extension.reason() or "")
    m, k, f, n = shape
    x, w = whole_numbers(m, k, 127), torch.randint(-127, 128, (f, k)).to(torch.int8)
    raw = torch.ops.fastvlm_cpu
    if quads and not _has_quads():
        pytest.skip("AVX-512 without VNNI")
    linear = raw.int8_linear(x, w, torch.ones(f), None, None, None, quads)
    assert torch.equal(linear.double(), x.double() @ w.double().T)
    # a GELU leaves integers from 8 on as they are, and the bias makes them so
    few = torch.randint(-1, 2, (f, k)).to(torch.int8)
    few[:, 3:] = 0
    x = whole_numbers(m, k, 19)
    b1 = 70 - 127 * few[:, 0].float()
    b1[::64] += 57
    few[::64, 1:] = 0
    hidden = x.double() @ few.double().T + b1.double()
    assert hidden.min() > 8
    assert (hidden[:, ::64] == 127).all()
    assert hidden.max() <= 127
    w2 = torch.randint(-127, 128, (n, f)).to(torch.int8)
    ones = torch.ones(f), torch.ones(n)
    out = raw.int8_gelu_mlp(x, few, ones[0], b1, w2, ones[1], None, None, None, 0, quads)
    assert torch.equal(out.double(), hidden @ w2.double().T)


def _has_quads() -> bool:
    try:
        w = torch.ones(1, 1, dtype=torch.int8)
        torch.ops.fastvlm_cpu.int8_linear(
            torch.ones(1, 1), w, torch.ones(1), None, None, None, True
        )
    except RuntimeError:
        return False
    return True


def test_a_large_channel_costs_its_group_alone(on: Callable[..., Any]) -> None:
    x, w = torch.randn(70, 256), torch.randn(50, 256)
    x[:, 10] *= 1000
    w[:, 10] /= 1000  # the function is as it was
    stored, scale = ops.quantize_rows(w)
    out = on(ops.int8_linear, x, stored, scale)
    error = (out - x @ w.T).abs().mean()
    whole_row = (x / x.abs().amax(1, keepdim=True) * 127).round() * x.abs().amax(1, keepdim=True)
    assert (
        error < 0.5 * (whole_row / 127 @ (stored.float() * scale[:, None]).T - x @ w.T).abs().mean()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_reaches_its_row(value: float, on: Callable[..., Any]) -> None:
    x, w = torch.randn(70, 100), torch.randn(30, 100)
    x[3, 80] = value
    out = on(ops.int8_linear, x, *ops.quantize_rows(w))
    assert out[3].isnan().all()
    assert out.isfinite().all(1).sum() == 69
    mlp = (x, *ops.quantize_rows(w), None, *ops.quantize_rows(torch.randn(20, 30)), None)
    assert on(ops.int8_gelu_mlp, *mlp).isnan().all(1).tolist() == [r == 3 for r in range(70)]


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e36])
def test_extreme_sizes(size: float, on: Callable[..., Any]) -> None:
    x = torch.full((70, 64), size)
    w, scale = torch.ones(8, 64, dtype=torch.int8), torch.full((8,), 1 / 64)
    assert torch.allclose(on(ops.int8_linear, x, w, scale), x[:, :8], rtol=0.01, atol=1e-38)


def test_the_same_bits_for_any_number_of_threads() -> None:
    x, (w1, s1), (w2, s2) = torch.randn(500, 130), weight(260, 130), weight(70, 260)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(
                (ops.int8_linear(x, w1, s1), ops.int8_gelu_mlp(x, w1, s1, None, w2, s2, None))
            )
    finally:
        torch.set_num_threads(before)
    for linear, mlp in found[1:]:
        assert torch.equal(linear, found[0][0])
        assert torch.equal(mlp, found[0][1])


W, S = ops.quantize_rows(torch.randn(4, 5))
W2, S2 = ops.quantize_rows(torch.randn(3, 4))
X = torch.randn(6, 5)
linear, mlp = ops.int8_linear, ops.int8_gelu_mlp
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: linear([1], W, S), TypeError, r"int8_linear: x must be a torch.Tensor; got"),
    (lambda: linear(X.int(), W, S), ValueError, "x must be float32"),
    (
        lambda: linear(torch.tensor(1.0), W, S),
        ValueError,
        r"x must be of shape \[\.\.\., features\]",
    ),
    (lambda: linear(X, None, S), TypeError, "weight must be a torch.Tensor; got None"),
    (lambda: linear(X, W[:, :4], S), ValueError, r"weight must be of shape \[any, 5\]"),
    (
        lambda: linear(X, W.float(), S),
        ValueError,
        r"weight must be int8 \(fastvlm.ops.quantize_rows",
    ),
    (lambda: linear(X, W, None), TypeError, "scale must be a torch.Tensor; got None"),
    (lambda: linear(X, W, S[:3]), ValueError, r"scale must be of shape \[4\]"),
    (lambda: linear(X, W, S.double()), ValueError, "scale must be float32"),
    (lambda: linear(X, W, S, X[0]), ValueError, r"bias must be of shape \[4\]"),
    (lambda: linear(X, W, S, W[:, 0]), ValueError, "bias must be float32"),
    (lambda: linear(X, W, S, None, X), ValueError, r"residual must be of shape \[6, 4\]"),
    (
        lambda: linear(X, W, S, factors=torch.ones(4)),
        ValueError,
        "factors must be of a number that",
    ),
    (lambda: linear(X, W, S, factors=torch.ones(2).half()), ValueError, "factors must be float32"),
    (lambda: linear(X, W.to("meta"), S), ValueError, "weight must be on the device of x"),
    (lambda: mlp(X, W, S, None, W, S, None), ValueError, r"w2 must be of shape \[any, 4\]"),
    (lambda: mlp(X, W, S2, None, W2, S2, None), ValueError, r"scale1 must be of shape \[4\]"),
    (lambda: mlp(X, W, S, None, W2, S, None), ValueError, r"scale2 must be of shape \[3\]"),
    (lambda: mlp(X, W, S, X[0], W2, S2, None), ValueError, r"b1 must be of shape \[4\]"),
    (lambda: mlp(X, W, S, None, W2, S2, X[0]), ValueError, r"b2 must be of shape \[3\]"),
    (
        lambda: mlp(X, W, S, None, W2, S2, None, approximate="erf"),
        ValueError,
        "approximate must be one of",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_gradients_are_refused_by_the_name_of_what_wants_one() -> None:
    for name, call in {
        "x": lambda: linear(X.clone().requires_grad_(), W, S),
        "bias": lambda: linear(X, W, S, S.clone().requires_grad_()),
        "scale2": lambda: mlp(X, W, S, None, W2, S2.clone().requires_grad_(), None),
    }.items():
        with pytest.raises(RuntimeError, match=rf"{name} must not want a gradient.*inference_mode"):
            call()


def test_shapes_and_dtypes_of_what_comes() -> None:
    x = X.bfloat16().view(2, 3, 5)
    assert linear(x, W, S).shape == (2, 3, 4)
    assert linear(x, W, S).dtype == torch.bfloat16
    assert mlp(x, W, S, None, W2, S2, None, torch.zeros(2, 3, 3)).dtype == torch.float32
    with fastvlm.use("reference"):
        assert linear(X.double(), W, S).dtype == torch.float64
