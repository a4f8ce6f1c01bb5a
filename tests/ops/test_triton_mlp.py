"""The Triton kernels of the MLPs in tiles so small that every dimension has several, all ragged."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import emulator
import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm import ops
from fastvlm.reference._random import elementwise
from fastvlm.triton import configs
from fastvlm.triton.common import dot_precision
from fastvlm.triton.configs.products import sliced

KERNELS = ("geglu_forward", "geglu_backward", "gelu_forward", "gelu_backward")
# rows, input, hidden, output; three row blocks, of which the first two are a group
SHAPES = {"ragged": (37, 35, 33, 21), "even": (48, 32, 32, 32)}
P = 0.4


@pytest.fixture
def small() -> Iterator[None]:
    config = sliced(16, 16, 16, warps=1, stages=2, slices=2, group=2)
    tiles = dict.fromkeys((*KERNELS, "low_precision_linear"), config)
    with emulator.emulated(), configs.replaced(**tiles):
        yield


def geglu_inputs(shape: str, randn: Any) -> list[Tensor]:
    m, k, f, n = SHAPES[shape]
    return [
        randn(m, k, grad=True),
        *(randn(f, k, scale=k**-0.5, grad=True) for _ in range(2)),
        randn(n, f, scale=f**-0.5, grad=True),
    ]


def gelu_inputs(shape: str, randn: Any) -> list[Tensor]:
    m, k, f, n = SHAPES[shape]
    return [
        randn(m, k, grad=True),
        randn(f, k, scale=k**-0.5, grad=True),
        randn(f, grad=True),
        randn(n, f, scale=f**-0.5, grad=True),
        randn(n, grad=True),
    ]


@pytest.mark.triton
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", list(SHAPES))
class TestSeveralTiles:
    def test_geglu(
        self, shape: str, approximate: str, small: None, randn: Any, follows_the_error_rule: Any
    ) -> None:
        follows_the_error_rule(
            lambda *x: ops.geglu_mlp(*x, approximate=approximate),
            lambda *x: plain.geglu_mlp(*x, approximate),
            geglu_inputs(shape, randn),
        )

    def test_gelu(
        self, shape: str, approximate: str, small: None, randn: Any, follows_the_error_rule: Any
    ) -> None:
        follows_the_error_rule(
            lambda *x: ops.gelu_mlp(*x, approximate=approximate),
            lambda *x: plain.gelu_mlp(*x, approximate),
            gelu_inputs(shape, randn),
        )


@pytest.mark.triton
@pytest.mark.parametrize("stored", ["bf16", "int8"])
@pytest.mark.parametrize(("m", "k", "n"), [(37, 35, 33), (16, 48, 32)])
def test_stored_weight_in_several_tiles(
    m: int, k: int, n: int, stored: str, small: None, randn: Any, follows_the_error_rule: Any
) -> None:
    weight, scale = torch.randn(n, k) * torch.logspace(-1, 1, n)[:, None], None
    if stored == "int8":
        weight, scale = ops.quantize_rows(weight)
    else:
        weight = weight.bfloat16()
    exact = weight.double() if scale is None else weight.double() * scale.double()[:, None]
    follows_the_error_rule(
        lambda x, b: ops.low_precision_linear(x, weight, scale, b),
        lambda x, b: F.linear(x, exact.to(x.dtype), b),
        [randn(m, k), randn(n)],
    )


@pytest.mark.triton
def test_float16_rows_take_weights_that_float16_has_not(
    small: None, follows_the_error_rule: Any
) -> None:
    weight = (torch.randn(17, 20) * torch.logspace(-9, -5, 17)[:, None]).bfloat16()
    weight[:, 3] = 1e5
    x = torch.randn(4, 20) * 1e3
    x[:, 3] = 0
    exact = weight.double()
    follows_the_error_rule(
        lambda x: ops.low_precision_linear(x, weight),
        lambda x: (x.double() @ exact.t()).to(x.dtype),
        [x.half()],
    )


@pytest.mark.triton
def test_infinity_and_nan_stay_what_they_are(small: None) -> None:
    """float32 rows are multiplied in three parts, of which infinity has one."""
    x = torch.randn(4, 20)
    x[1, 3], x[2, 3], x[3, 3] = float("inf"), -float("inf"), float("nan")
    weight = torch.rand(17, 20).add(0.5).bfloat16()
    out = ops.low_precision_linear(x, weight)
    assert out[0].isfinite().all()
    assert (out[1] == float("inf")).all()
    assert (out[2] == -float("inf")).all()
    assert out[3].isnan().all()


def _only_what_is_wanted(name: str, arguments: tuple[Any, ...], count: int, x: Tensor) -> None:
    """All gradients, none of them, each alone, and all but each."""
    op, each = getattr(torch.ops.fastvlm, name), range(count)
    everything = op(*arguments, [True] * count)
    for wanted in (set(), *({i} for i in each), *(set(each) - {i} for i in each)):
        for i, (grad, full) in enumerate(
            zip(op(*arguments, [i in wanted for i in each]), everything)
        ):
            if i in wanted:
                assert torch.equal(grad, full), (wanted, i)
                assert grad.is_contiguous()
            else:
                assert (grad.shape, grad.dtype) == ((0,), x.dtype), (wanted, i)


@pytest.mark.triton
def test_geglu_gradients_only_for_what_wants_one(small: None) -> None:
    shapes = [(18, 5), (17, 5), (17, 5), (3, 17)]
    x, w_gate, w_up, w_down = (torch.randn(shape).half() for shape in shapes)
    gate, up = x @ w_gate.t(), x @ w_up.t()
    arguments = (torch.randn(18, 3).half(), x, gate, up, w_gate, w_up, w_down, True)
    _only_what_is_wanted("geglu_mlp_backward", arguments, 4, x)


@pytest.mark.triton
def test_gelu_gradients_only_for_what_wants_one(small: None) -> None:
    x, w1, w2 = (torch.randn(shape).half() for shape in [(18, 5), (17, 5), (3, 17)])
    seed = torch.tensor([5])
    arguments = (torch.randn(18, 3).half(), x, x @ w1.t(), w1, w2, seed, False, P)
    _only_what_is_wanted("gelu_mlp_backward", arguments, 5, x)


@pytest.mark.triton
@pytest.mark.parametrize("seed", [0, -7, 2**63 - 1])
def test_the_mask_is_the_references(seed: int, small: None) -> None:
    """The identity as weights shows the factor of each element, forward and backward."""
    rows, width = 21, 37
    at, one = torch.tensor([seed]), torch.eye(width)
    x = torch.full((rows, width), 2.0)
    want = elementwise(at, x, P, torch.float32)
    hidden, _ = torch.ops.fastvlm.gelu_mlp(x, one, None, one, None, at, False, P, False)
    torch.testing.assert_close(hidden, F.gelu(x) * want)
    assert torch.equal(hidden != 0, want != 0)
    dx, _, db1, dw2, _ = torch.ops.fastvlm.gelu_mlp_backward(
        torch.ones(rows, width), x, x, one, one, at, False, P, [True, False, True, True, False]
    )
    assert torch.equal(dx != 0, want != 0)
    torch.testing.assert_close(db1, dx.sum(0))
    torch.testing.assert_close(dw2, hidden.sum(0).expand(width, width))


@pytest.mark.triton
def test_strided_inputs(small: None, follows_the_error_rule: Any) -> None:
    m, k, f, n = SHAPES["ragged"]
    x = torch.randn(m, 2 * k)[:, 3 : 3 + k].requires_grad_()
    weights = [
        torch.randn(f, k + 7)[:, 7:],
        torch.randn(k, f).t(),
        torch.randn(2 * n, f)[::2],
    ]
    inputs = [x, *(w.mul_(0.2).requires_grad_() for w in weights)]
    follows_the_error_rule(ops.geglu_mlp, lambda *t: plain.geglu_mlp(*t, "tanh"), inputs)
    biases = torch.randn(f, 2)[:, 0], torch.randn(n, 3)[:, 1]
    inputs = [x, weights[0], biases[0], weights[2], biases[1]]
    follows_the_error_rule(ops.gelu_mlp, lambda *t: plain.gelu_mlp(*t, "none"), inputs)
    weight = torch.randn(f, 2 * k).bfloat16()[:, :k]
    follows_the_error_rule(
        lambda x, b: ops.low_precision_linear(x, weight, None, b),
        lambda x, b: F.linear(x, weight.to(x.dtype), b),
        [x.detach(), biases[0]],
    )


@pytest.mark.triton
def test_two_runs_are_bit_identical(small: None, randn: Any) -> None:
    inputs = gelu_inputs("ragged", randn)

    def grads() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ops.gelu_mlp(*inputs).square().sum(), inputs)

    assert all(torch.equal(a, b) for a, b in zip(grads(), grads()))


@pytest.mark.triton
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_slope_over_its_whole_range(approximate: str) -> None:
    """With the identity as weights the gradient is the slope; far out it is 0 and 1, never NaN."""
    ends = torch.tensor([1e4, 1e10, 1e19, 1e30])
    line = torch.cat([torch.linspace(-14, 14, 1017), -ends, ends])
    x, one = line.view(-1, 25).contiguous(), torch.eye(25)
    with emulator.emulated():
        dx, *_ = torch.ops.fastvlm.gelu_mlp_backward(
            torch.ones_like(x), x, x, one, one, None, approximate == "tanh", 0.0,
            [True, False, False, False, False],
        )  # fmt: skip
    wide = line.double().requires_grad_()
    (exact,) = torch.autograd.grad(F.gelu(wide, approximate=approximate).sum(), wide)
    exact = torch.where(line.abs() > 1e3, (line > 0).double(), exact)
    assert (dx.flatten() - exact).abs().max() < 4 * torch.finfo(torch.float32).eps


@pytest.mark.triton
def test_the_tail_of_the_tanh_form_does_not_cancel() -> None:
    x, one = torch.linspace(-5, -1, 50).view(-1, 1), torch.ones(1, 1)
    with emulator.emulated():
        out = ops.gelu_mlp(x, one, None, one, None, approximate="tanh")
    wide = x.double()
    u = (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    exact = wide * torch.sigmoid(2 * u)
    assert ((out - exact) / exact).abs().max() < 64 * torch.finfo(torch.float32).eps


def test_float32_is_full_unless_pytorch_is_told_otherwise() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in {"highest": "ieee", "high": "tf32", "medium": "tf32"}.items():
            torch.set_float32_matmul_precision(setting)
            assert dot_precision(torch.empty(1)) == expected
            assert dot_precision(torch.empty(1, dtype=torch.float16)) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("family", configs.FAMILIES)
def test_every_call_finds_a_config(family: str) -> None:
    x = torch.empty(0)
    with configs.assumed(family):
        for rows, bits, columns in product((16, 32, 64, 128, 8192), (16, 32), (1, 2304, 256_000)):
            key = {"rows": rows, "columns": columns, "depth": 100, "bits": bits}
            for kernel in KERNELS:
                for config in configs.options(kernel, x, **key):
                    slice_ = config.blocks["BLOCK_N"] // config.blocks["SLICES"]
                    assert slice_ * bits >= 128, "less than a vector in a row"
            for config in configs.options(
                "low_precision_linear", x, **key, stored=8, terms=bits // 16
            ):
                assert config.blocks["BLOCK_M"] >= min(rows, 64), "a weight is read twice"
