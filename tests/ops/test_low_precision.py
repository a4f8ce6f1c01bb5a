"""low_precision_linear and quantize_rows against plain PyTorch on the weight they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import activated
from torch import Tensor

import fastvlm
from fastvlm import ops
from fastvlm.reference import mlp as reference
from fastvlm.reference.mlp import ACTIVATIONS

BF16 = torch.bfloat16
# rows, input, output: odd on purpose; the last but one is too many for the CPU kernel
SHAPES = {
    "one": (1, 577, 100),
    "three": (3, 17, 63),
    "seven": (7, 768, 333),
    "narrow": (5, 1, 3),
    "beams": (33, 63, 577),
    "limit": (64, 100, 17),
    "many": (65, 63, 100),
    "empty": (0, 17, 3),
    "no input": (3, 0, 5),
    "no output": (3, 5, 0),
}
STORAGES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor | None]]] = {
    "bf16": lambda w: (w.to(BF16), None),
    "int8": ops.quantize_rows,
}


@pytest.fixture(params=list(STORAGES))
def stored(request: pytest.FixtureRequest) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A random weight [n, k] as it is stored: the weight and the factors of its rows."""

    def make(n: int, k: int) -> tuple[Tensor, Tensor | None]:
        # rows of very different sizes: one factor for all of them would show
        weight = torch.randn(n, k) * max(k, 1) ** -0.5 * torch.logspace(-1, 1, n)[:, None]
        return STORAGES[request.param](weight)

    return make


def widened(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The weight that is stored, exactly: a product of int8 and float32 fits into float64."""
    return weight.double() if scale is None else weight.double() * scale.double()[:, None]


def plain(weight: Tensor, scale: Tensor | None) -> Callable[..., Tensor]:
    exact = widened(weight, scale)
    return lambda x, bias: F.linear(x, exact.to(x.dtype), bias)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_product(
    shape: str, bias: bool, stored: Any, on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    m, k, n = SHAPES[shape]
    weight, scale = stored(n, k)
    follows_the_error_rule(
        lambda x, b: on(ops.low_precision_linear, x, weight, scale, b),
        plain(weight, scale),
        [randn(m, k), randn(n) if bias else None],
    )


def low_precision_hidden(x: Tensor, *rest: Any) -> Tensor:
    """What a planned step calls: there is no public function."""
    return torch.ops.fastvlm.low_precision_hidden(x, *rest)


# of few numbers, each a product of two sums, it is luck how far plain PyTorch is off
ENOUGH = [name for name in SHAPES if name not in ("one", "three")]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", ENOUGH)
def test_activated_products(
    shape: str, activation: str, stored: Any, on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    """With a bias, as in BART; with a second weight, as in Gemma."""
    m, k, n = SHAPES[shape]
    (weight, scale), (up, up_scale) = stored(n, k), stored(n, k)
    number = ACTIVATIONS.index(activation)
    follows_the_error_rule(
        lambda x, b: on(low_precision_hidden, x, weight, scale, b, None, None, number),
        lambda x, b: activated(plain(weight, scale)(x, b), activation),
        [randn(m, k), randn(n)],
    )
    follows_the_error_rule(
        lambda x: on(low_precision_hidden, x, weight, scale, None, up, up_scale, number),
        lambda x: (
            activated(plain(weight, scale)(x, None), activation) * plain(up, up_scale)(x, None)
        ),
        [randn(m, k)],
    )


def test_strides_and_leading_dimensions(
    stored: Any, on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    wide = randn(2, 3, 80)
    weight, scale = stored(7, 40)
    transposed = weight.t().contiguous().t()
    for x in (wide[..., :40], wide[..., ::2], randn(40, 2, 3).permute(1, 2, 0)):
        for w in (weight, transposed):
            follows_the_error_rule(
                lambda x, b, w=w: on(ops.low_precision_linear, x, w, scale, b),
                plain(weight, scale),
                [x, None],
            )


def test_a_large_weight_is_widened_in_blocks(
    stored: Any, monkeypatch: pytest.MonkeyPatch, randn: Any, follows_the_error_rule: Any
) -> None:
    weight, scale = stored(577, 63)
    monkeypatch.setattr(reference, "_BLOCK", 63 * 100)
    assert len(list(reference.row_blocks(weight))) == 6
    with fastvlm.use("reference"):
        follows_the_error_rule(
            lambda x, b: ops.low_precision_linear(x, weight, scale, b),
            plain(weight, scale),
            [randn(3, 63), randn(577)],
        )


def test_float64_rows_are_exact(stored: Any) -> None:
    weight, scale = stored(63, 100)
    x = torch.randn(3, 100, dtype=torch.float64)
    torch.testing.assert_close(
        ops.low_precision_linear(x, weight, scale), x @ widened(weight, scale).T
    )


def test_two_runs_are_bit_identical(stored: Any, on: Any, randn: Any) -> None:
    weight, scale = stored(333, 100)
    x = randn(5, 100)
    first, second = (on(ops.low_precision_linear, x, weight, scale) for _ in range(2))
    assert torch.equal(first, second)


def test_autocast_gives_its_dtype(stored: Any) -> None:
    weight, scale = stored(5, 8)
    x, bias = torch.randn(3, 8), torch.randn(5)
    with torch.autocast("cpu", BF16):
        out = ops.low_precision_linear(x, weight, scale, bias)
    assert out.dtype == BF16
    want = F.linear(x.to(BF16).double(), widened(weight, scale), bias.to(BF16).double())
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)


class TestQuantizeRows:
    @pytest.mark.parametrize("shape", [(1, 1), (3, 17), (63, 100), (577, 3), (0, 4), (4, 0)])
    def test_half_a_step_off_at_most(self, shape: tuple[int, int], randn: Any) -> None:
        weight = randn(*shape)
        before = weight.clone()
        stored, scale = ops.quantize_rows(weight)
        assert (stored.dtype, scale.dtype) == (torch.int8, torch.float32)
        assert (stored.shape, scale.shape) == (weight.shape, weight.shape[:1])
        assert torch.equal(weight, before)
        error = (widened(stored, scale) - weight.double()).abs()
        assert (error <= scale.double()[:, None] * 0.5001).all()
        if weight.numel():
            assert torch.equal(stored.int().abs().amax(1), torch.full(shape[:1], 127).int())

    def test_halves_go_to_the_even_number(self) -> None:
        row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]])
        assert ops.quantize_rows(row)[0].tolist() == [[127, 0, 2, 2, 0, -2, -127]]

    def test_zero_and_tiny_rows(self) -> None:
        tiny = torch.finfo(torch.float32).tiny
        weight = torch.tensor([[0.0, 0.0], [tiny / 4, -tiny], [3.0, -1.0]])
        stored, scale = ops.quantize_rows(weight)
        assert scale.isfinite().all()
        assert (scale > 0).all()
        out = ops.low_precision_linear(torch.ones(1, 2), stored, scale)
        assert out[0, 0] == 0
        assert out.isfinite().all()

    def test_the_blocks_leave_no_seam(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = torch.randn(100, 17).t().contiguous().t()
        stored, scale = ops.quantize_rows(weight)
        monkeypatch.setattr(reference, "_BLOCK", 17 * 7)
        again, scale_again = ops.quantize_rows(weight)
        assert stored.is_contiguous()
        assert torch.equal(stored, again)
        assert torch.equal(scale, scale_again)

    def test_a_nan_stays_one(self) -> None:
        weight = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
        out = ops.low_precision_linear(torch.ones(1, 2), *ops.quantize_rows(weight))
        assert out.isnan().tolist() == [[True, False]]


W, S = ops.quantize_rows(torch.ones(4, 5))
X = torch.randn(3, 5)
low = ops.low_precision_linear
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: low([1], W, S), TypeError, r"low_precision_linear: x must be a torch.Tensor; got"),
    (lambda: low(X.int(), W, S), ValueError, "x must be float32"),
    (lambda: low(X, None), TypeError, "weight must be a torch.Tensor; got None"),
    (lambda: low(X, W[:, :4], S), ValueError, r"weight must be of shape \[any, 5\]"),
    (lambda: low(X, W.float(), S), ValueError, "weight must be bfloat16, or int8 with a scale"),
    (lambda: low(X, W), TypeError, "scale must be a torch.Tensor; got None"),
    (lambda: low(X, W, S[:3]), ValueError, r"scale must be of shape \[4\]"),
    (lambda: low(X, W, S.double()), ValueError, "scale must be float32"),
    (lambda: low(X, W.to(BF16), S), ValueError, "scale must be None for a bfloat16 weight"),
    (lambda: low(X, W, S, X[0]), ValueError, r"bias must be of shape \[4\]"),
    (lambda: low(X, W, S, S.half()), ValueError, "bias must be of the dtype of x"),
    (lambda: low(X, W.to("meta"), S), ValueError, "weight must be on the device of x"),
    (lambda: low(X, W, S.to("meta")), ValueError, "scale must be on the device of x"),
    (lambda: ops.quantize_rows(W), ValueError, "quantize_rows: weight must be float32"),
    (lambda: ops.quantize_rows(S), ValueError, r"weight must be of shape \[any, any\]"),
    (lambda: ops.quantize_rows(None), TypeError, "weight must be a torch.Tensor"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_gradients_are_refused_by_the_name_of_what_wants_one() -> None:
    wants = {
        "x": lambda: low(X.clone().requires_grad_(), W, S),
        "weight": lambda: low(X, W.to(BF16).requires_grad_()),
        "scale": lambda: low(X, W, S.clone().requires_grad_()),
        "bias": lambda: low(X, W, S, S.clone().requires_grad_()),
    }
    for name, call in wants.items():
        with pytest.raises(RuntimeError, match=rf"{name} must not want a gradient.*inference_mode"):
            call()
        with torch.no_grad():
            call()
        with torch.inference_mode():
            call()
