"""bf16_linear and bf16_gelu_mlp against their reference, and against what they stand for.

The kernels run on every CPU: where there is neither AMX nor AVX-512 BF16 they multiply one by one,
for these tests, and no op of ours calls them.
"""

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
from fastvlm.cpu import bf16 as launchers
from fastvlm.reference import bf16 as reference
from fastvlm.reference.mlp import ACTIVATIONS

# rows, input, output: odd on purpose; whole tiles and blocks of them, and what is left behind
SHAPES = {
    "one": (1, 577, 100),
    "tile": (16, 32, 32),
    "seventeen": (17, 64, 128),
    "narrow": (5, 1, 3),
    "pairs": (33, 130, 577),
    "blocks": (390, 300, 140),
    "many": (1600, 100, 33),
    "empty": (0, 17, 3),
    "no input": (3, 0, 5),
    "no output": (3, 5, 0),
}
BACKENDS = ["reference", "cpu"]
KINDS = ["bf16", "transposed", "int8"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The plain one, or the kernels, which are called as they are: not every CPU serves the op."""
    if request.param == "cpu" and not extension.available():
        pytest.skip(extension.reason() or "")
    return str(request.param)


@pytest.fixture
def linear(backend: str) -> Callable[..., Tensor]:
    return reference.bf16_linear if backend == "reference" else launchers.bf16_linear


@pytest.fixture
def mlp(backend: str) -> Callable[..., Tensor]:
    return reference.bf16_gelu_mlp if backend == "reference" else launchers.bf16_gelu_mlp


def weight(n: int, k: int, kind: str) -> tuple[Tensor, Tensor | None]:
    # rows of very different sizes: one factor for all of them would show
    sizes = torch.logspace(-1, 1, n)[:, None] if n else torch.ones(0, 1)
    w = torch.randn(n, k) * max(k, 1) ** -0.5 * sizes
    if kind == "int8":
        return ops.quantize_rows(w)
    w = w.bfloat16()
    return (w.t().contiguous().t() if kind == "transposed" else w), None


def exact(x: Tensor, w: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    wide = w.double() if scale is None else w.double() * scale.double()[:, None]
    return F.linear(x.bfloat16().double(), wide, None if bias is None else bias.double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", ["", "bias", "bias residual factors", "residual"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_product(shape: str, ends: str, kind: str, dtype: torch.dtype, linear: Any) -> None:
    m, k, n = SHAPES[shape]
    w, scale = weight(n, k, kind)
    x = (torch.randn(m, k) * torch.logspace(-2, 2, max(1, m))[:m, None]).to(dtype)
    bias = torch.randn(n, dtype=dtype) if "bias" in ends else None
    # a residual of another dtype: the sum has its
    residual = torch.randn(m, n) if "residual" in ends else None
    factors = torch.rand(max(1, m)) if "factors" in ends else None
    ours = linear(x, w, scale, bias, residual, factors)
    plain = reference.bf16_linear(x, w, scale, bias, residual, factors)
    want = exact(x, w, scale, bias)
    if factors is not None and m:
        want = want * factors.double()[:, None]
    want = want if residual is None else residual.double() + want
    assert ours.shape == want.shape
    # each row by itself: the largest would hide what is wrong with the others
    for row in range(0, m, max(1, m // 7)):
        error_rule.check(f"row {row}", ours[row], plain[row], want[row], error_rule.FORWARD)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "silu", "gelu"])
@pytest.mark.parametrize("shape", [(5, 17, 40, 9), (200, 100, 300, 65), (1600, 70, 130, 40)])
def test_mlp(
    shape: tuple[int, ...], activation: str, kind: str, dtype: torch.dtype, mlp: Any
) -> None:
    """A rounding before the second rounding moves a number to its neighbour: the whole MLP is
    compared by what roundings cost, in ours and in plain PyTorch."""
    m, k, f, n = shape
    (w1, s1), (w2, s2) = weight(f, k, kind), weight(n, f, kind)
    x, residual = torch.randn(m, k).to(dtype), torch.randn(m, n)
    b1, b2 = torch.randn(f), torch.randn(n).to(dtype)
    factors = torch.rand(m // 5 if m % 5 == 0 else 1)
    arguments = (x, w1, s1, b1, w2, s2, b2, residual, factors, ACTIVATIONS.index(activation))
    ours, plain = mlp(*arguments), reference.bf16_gelu_mlp(*arguments)
    hidden = activated(exact(x, w1, s1, b1), activation)
    wide = w2.double() if s2 is None else w2.double() * s2.double()[:, None]
    branch = F.linear(hidden, wide, b2.double())
    each = factors.double().repeat_interleave(m // factors.numel())[:, None]
    error_rule.check("mlp", ours, plain, residual.double() + each * branch, error_rule.FORWARD)


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "gelu"])
def test_an_activation_is_off_by_little_more_than_its_rounding(activation: str, mlp: Any) -> None:
    """Each of many numbers by itself: an error rule of the largest would forgive the small ones."""
    x = torch.linspace(-3, 9, 20_000).bfloat16().float()[:, None]
    one = torch.ones(1, 1).bfloat16()
    number = ACTIVATIONS.index(activation)
    ours = mlp(x, one, None, None, one, None, None, None, None, number).double()
    exact = activated(x.double(), activation)
    assert ((ours - exact).abs() <= 1.1 * 2**-8 * exact.abs()).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lies", ["as it is", "transposed"])
@pytest.mark.parametrize("shape", [(6, 64, 130), (195, 130, 200), (900, 65, 190), (1, 3, 40)])
def test_every_element_is_where_it_belongs(
    shape: tuple[int, ...], lies: str, kind: str, dtype: torch.dtype, linear: Any
) -> None:
    """Where nothing is rounded the products are exact, but for their own rounding."""
    m, k, n = shape
    x = torch.randint(-127, 128, (m, k)).to(dtype)
    x = x.t().contiguous().t() if lies == "transposed" else x
    w = torch.randint(-127, 128, (n, k)).to(torch.int8)
    scale = torch.full((n,), 0.5) if kind == "int8" else None
    given = w if kind == "int8" else w.bfloat16()
    given = given.t().contiguous().t() if kind == "transposed" else given
    out = linear(x, given, scale, None, None, None)
    want = x.double() @ w.double().T * (0.5 if kind == "int8" else 1.0)
    assert torch.equal(out, want.to(dtype))


@pytest.mark.parametrize("shape", [(70, 40, 9), (33, 31, 64), (400, 500, 33)])
def test_a_transpose_between_others(shape: tuple[int, ...], dtype: torch.dtype, mlp: Any) -> None:
    """Of columns of a larger matrix, with NaN around them: none of it is read as theirs."""
    m, k, f = shape
    around = torch.full((k + 2, m + 7), float("nan"), dtype=dtype)
    around[1:-1, 3:-4] = torch.randint(-4, 5, (k, m)).to(dtype)
    x = around[1:-1, 3:-4].t()
    w1, w2 = (torch.randint(-4, 5, size).bfloat16() for size in ((f, k), (5, f)))
    rest = (None, None, None, None, ACTIVATIONS.index("relu"))
    out = mlp(x, w1, None, None, w2, *rest)
    assert torch.equal(out, mlp(x.contiguous(), w1, None, None, w2, *rest))
    assert out.isfinite().all()


def test_rows_with_a_stride(linear: Any) -> None:
    x, w = torch.randn(70, 100).bfloat16()[:, 13:77], torch.randn(40, 90).bfloat16()[:, 5:69]
    bias, to = torch.randn(80)[::2], torch.randn(70, 50)[:, :40]
    out = linear(x, w, None, bias, to, None)
    assert torch.allclose(out, to + exact(x, w, None, bias).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_reaches_its_row(value: float, linear: Any, mlp: Any) -> None:
    """And no other one: the kernels multiply what lies behind a row, too."""
    for k in (100, 96):
        x, w = torch.randn(70, k), torch.randn(30, k).bfloat16()
        x[3, k - 1] = value
        out = linear(x, w, None, None, None, None)
        assert not out[3].isfinite().any()
        assert out.isfinite().all(1).sum() == 69
        w[7, k - 1] = float("nan")
        out = linear(torch.randn(70, k), w, None, None, None, None)
        assert out.isnan().any(0).nonzero().flatten().tolist() == [7]
        w[7] = 1.0
        out = mlp(x, w, None, None, torch.randn(20, 30).bfloat16(), None, None, None, None, 2)
        assert out.isfinite().all(1).tolist() == [r != 3 for r in range(70)]


def test_the_same_bits_for_any_number_of_threads(linear: Any, mlp: Any) -> None:
    x, w1, w2 = torch.randn(500, 130), *(torch.randn(n, k) for n, k in ((260, 130), (70, 260)))
    a, b = w1.bfloat16(), w2.bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            first = linear(x, a, None, None, None, None)
            found.append((first, mlp(x, a, None, None, b, None, None, None, None, 0)))
    finally:
        torch.set_num_threads(before)
    if linear is launchers.bf16_linear:
        for each in found[1:]:
            assert all(torch.equal(*pair) for pair in zip(each, found[0], strict=True))


W, W2 = torch.randn(4, 5).bfloat16(), torch.randn(3, 4).bfloat16()
Q, S = ops.quantize_rows(torch.randn(4, 5))
X = torch.randn(6, 5)
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.bf16_linear([1], W), TypeError, r"bf16_linear: x must be a torch.Tensor; got"),
    (lambda: ops.bf16_linear(X.int(), W), ValueError, "x must be float32"),
    (lambda: ops.bf16_linear(X, None), TypeError, "weight must be a torch.Tensor; got None"),
    (lambda: ops.bf16_linear(X, W[:, :4]), ValueError, r"weight must be of shape \[any, 5\]"),
    (
        lambda: ops.bf16_linear(X, W.float()),
        ValueError,
        "weight must be bfloat16, or int8 with its scale",
    ),
    (lambda: ops.bf16_linear(X, Q), ValueError, "weight must be bfloat16, or int8 with its scale"),
    (lambda: ops.bf16_linear(X, W, S), ValueError, "scale must be None for a weight of bfloat16"),
    (lambda: ops.bf16_linear(X, Q, S[:3]), ValueError, r"scale must be of shape \[4\]"),
    (lambda: ops.bf16_linear(X, Q, S.double()), ValueError, "scale must be float32"),
    (lambda: ops.bf16_linear(X, W, None, X[0]), ValueError, r"bias must be of shape \[4\]"),
    (lambda: ops.bf16_linear(X, W, None, None, X), ValueError, r"residual must be of shape"),
    (
        lambda: ops.bf16_linear(X, W, factors=torch.ones(4)),
        ValueError,
        "factors must be of a number that",
    ),
    (lambda: ops.bf16_linear(X, W.to("meta")), ValueError, "weight must be on the device of x"),
    (
        lambda: ops.bf16_gelu_mlp(X, W, None, None, W, None, None),
        ValueError,
        r"w2 must be of shape \[any, 4\]",
    ),
    (
        lambda: ops.bf16_gelu_mlp(X, Q, S, None, W2, S, None),
        ValueError,
        "scale2 must be None for a weight of bfloat16",
    ),
    (
        lambda: ops.bf16_gelu_mlp(X, W, None, None, W2, None, None, approximate="erf"),
        ValueError,
        "approximate must be one of",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_gradients_are_refused_by_the_name_of_what_wants_one() -> None:
    with pytest.raises(RuntimeError, match=r"bf16_linear: x must not want a gradient"):
        ops.bf16_linear(X.clone().requires_grad_(), W)
    with pytest.raises(RuntimeError, match=r"w2 must not want a gradient.*inference_mode"):
        ops.bf16_gelu_mlp(X, W, None, None, W2.clone().requires_grad_(), None, None)


def test_shapes_and_dtypes_of_what_comes() -> None:
    x = X.bfloat16().view(2, 3, 5)
    assert ops.bf16_linear(x, W).shape == (2, 3, 4)
    assert ops.bf16_linear(x, W).dtype == torch.bfloat16
    to = torch.zeros(2, 3, 3)
    assert ops.bf16_gelu_mlp(x, Q, S, None, W2, None, None, to).dtype == torch.float32
    with fastvlm.use("reference"):
        assert ops.bf16_linear(X.double(), W).dtype == torch.float64
