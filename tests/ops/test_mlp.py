"""linear, gelu_mlp and geglu_mlp against plain PyTorch."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm import ops
from fastvlm.cpu import gemm

# rows, input, hidden, output; "many" are more than our kernels stream
SHAPES = {
    "one": (1, 17, 63, 5),
    "three": (3, 100, 333, 77),
    "seven": (7, 768, 100, 768),
    "sixteen": (16, 64, 65, 1),
    "beams": (33, 63, 100, 64),
    "many": (65, 63, 100, 64),
    "empty": (0, 17, 3, 5),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("grad", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_linear(
    shape: str, grad: bool, bias: bool, on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    m, k, _, n = SHAPES[shape]
    inputs = [randn(m, k, grad=grad), randn(n, k, scale=k**-0.5, grad=grad)]
    inputs.append(randn(n, grad=grad) if bias else None)
    follows_the_error_rule(lambda *x: on(ops.linear, *x), F.linear, inputs)


@pytest.mark.parametrize("grad", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_weights_that_lie_as_inputs_by_outputs(
    shape: str, grad: bool, on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    """GPT-2's: views, of which the gradient is the weight's."""
    m, k, f, n = SHAPES[shape]
    weights = [randn(k, f, scale=k**-0.5, grad=grad), randn(f, n, scale=f**-0.5, grad=grad)]
    inputs = [randn(m, k, grad=grad), *weights, randn(f, grad=grad), randn(n, grad=grad)]
    follows_the_error_rule(
        lambda x, w1, w2, b1, b2: on(ops.gelu_mlp, x, w1.t(), b1, w2.t(), b2),
        lambda x, w1, w2, b1, b2: plain.gelu_mlp(x, w1.t(), b1, w2.t(), b2, "gelu"),
        inputs,
    )
    follows_the_error_rule(
        lambda x, w1, w2, b1, b2: on(ops.linear, x, w1.t(), b1),
        lambda x, w1, w2, b1, b2: F.linear(x, w1.t(), b1),
        inputs,
    )


@pytest.mark.parametrize("library", ["aten", "onednn", "packed"])
def test_linear_on_either_library(
    library: str, monkeypatch: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    monkeypatch.setenv(gemm.VARIABLE, library)
    inputs = [randn(130, 63, grad=True), randn(100, 63, scale=0.1, grad=True), randn(100)]
    follows_the_error_rule(ops.linear, F.linear, inputs)


@pytest.mark.parametrize(("slow_turns", "ahead"), [(5, True), (4, True), (3, False), (0, False)])
def test_a_library_is_ahead_by_nearly_every_turn(
    slow_turns: int, ahead: bool, monkeypatch: Any
) -> None:
    """Not by its best one: what else runs would decide for the whole process."""
    now, turn = [0.0], [-1]  # the first turn only warms up

    def one(x: Tensor, weight: Tensor, bias: None) -> Tensor:
        now[0] += 1.0
        return x

    def other(x: Tensor, weight: Tensor, bias: None) -> Tensor:
        if x.shape == (250, 768) and weight.is_contiguous():
            turn[0] += 1
        # hardly slower in the other turns, and as fast once
        now[0] += 2.0 if 0 < turn[0] <= slow_turns else 1.2
        return x

    monkeypatch.setattr(gemm.time, "perf_counter", lambda: now[0])
    assert gemm._is_ahead(one, other) is ahead


def test_thin_products_of_bfloat16_are_a_librarys(monkeypatch: Any) -> None:
    """As on a CPU with AMX."""
    monkeypatch.setattr(gemm.bf16, "tiles", lambda: True)
    monkeypatch.setattr(gemm, "_native_bf16", lambda: True)
    monkeypatch.setattr(gemm, "may_pack", lambda: True)
    shapes = []

    def packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append((*x.shape, weight.shape[0]))
        return F.linear(x, weight, bias)

    monkeypatch.setattr(gemm, "packed_product", packed)
    for m, k, n in ((300, 300, 300), (300, 8, 300), (300, 300, 8), (30, 300, 300)):
        x, weight = torch.randn(k, m).bfloat16().t(), torch.randn(n, k).bfloat16()
        assert torch.equal(gemm.product(x, weight), F.linear(x, weight))
    assert shapes == [(300, 300, 300)]


def test_onednn_sees_few_shapes(monkeypatch: Any) -> None:
    """It keeps a kernel for each, so batches of many lengths must not be as many shapes."""
    monkeypatch.setenv(gemm.VARIABLE, "onednn")
    shapes = set()
    product = gemm.pytorch.onednn_linear

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.add((tuple(x.shape), x.stride(0) > x.stride(1), tuple(weight.shape)))
        return product(x, weight, bias)

    monkeypatch.setattr(gemm.pytorch, "onednn_linear", noted)
    leaves = [torch.randn(24, 40), torch.randn(24), torch.randn(40, 24), torch.randn(40)]
    w1, b1, w2, b2 = (leaf.requires_grad_() for leaf in leaves)
    for rows in [*range(65, 1400, 23), 3000, 5001]:
        x = torch.randn(rows, 40, requires_grad=True)
        out = ops.gelu_mlp(x, w1, b1, w2, b2)
        out.backward(torch.ones_like(out))
        with torch.no_grad():
            exact = F.linear(F.gelu(F.linear(x.double(), w1.double(), b1.double())), w2.double())
            torch.testing.assert_close(out.double(), exact + b2, atol=1e-4, rtol=1e-4)
    # eight sizes up to 1024 rows for each of four products, and the gradients of two weights
    assert len(shapes) <= 4 * 8 + 2 * 12


def test_linear_is_differentiable_twice() -> None:
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    assert torch.autograd.gradcheck(ops.linear, leaves)
    assert torch.autograd.gradgradcheck(ops.linear, leaves)


def test_a_library_that_nobody_knows_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setenv(gemm.VARIABLE, "mkl")
    with pytest.raises(ValueError, match="FASTVLM_GEMM must be one of"):
        ops.linear(torch.randn(100, 8), torch.randn(4, 8))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("grad", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_gelu_mlp(
    shape: str,
    grad: bool,
    bias: bool,
    approximate: str,
    on: Any,
    randn: Any,
    follows_the_error_rule: Any,
) -> None:
    m, k, f, n = SHAPES[shape]
    inputs = [
        randn(m, k, grad=grad),
        randn(f, k, scale=k**-0.5, grad=grad),
        randn(f, grad=grad) if bias else None,
        randn(n, f, scale=f**-0.5, grad=grad),
        randn(n, grad=grad) if bias else None,
    ]
    follows_the_error_rule(
        lambda *x: on(ops.gelu_mlp, *x, approximate=approximate),
        lambda *x: plain.gelu_mlp(*x, approximate),
        inputs,
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("grad", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_geglu_mlp(
    shape: str, grad: bool, approximate: str, on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    m, k, f, n = SHAPES[shape]
    inputs = [randn(m, k, grad=grad)]
    inputs += [randn(f, k, scale=k**-0.5, grad=grad) for _ in range(2)]
    inputs += [randn(n, f, scale=f**-0.5, grad=grad)]
    follows_the_error_rule(
        lambda *x: on(ops.geglu_mlp, *x, approximate=approximate),
        lambda *x: plain.geglu_mlp(*x, approximate),
        inputs,
    )


def test_strides_and_leading_dimensions(on: Any, randn: Any, follows_the_error_rule: Any) -> None:
    wide = randn(2, 3, 80)
    for x in (wide[..., :40], wide[..., ::2], randn(40, 2, 3).permute(1, 2, 0)):
        weight = randn(7, 40)
        follows_the_error_rule(lambda x, w: on(ops.linear, x, w), F.linear, [x, weight])
    transposed = randn(40, 7).t()
    follows_the_error_rule(
        lambda x, w: on(ops.linear, x, w), F.linear, [wide[..., :40], transposed]
    )


@pytest.mark.parametrize("kind", ["erf", "tanh"])
def test_gelu_over_its_whole_range(kind: str, on: Any) -> None:
    """Far from 0, near 0 and in between: the identity as weights shows the activation alone."""
    approximate = "none" if kind == "erf" else "tanh"
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-20, 1, 95)])
    one = torch.ones(1, 1)
    columns = x.view(-1, 16).t().contiguous().t()
    ours = torch.cat([on(ops.gelu_mlp, c[:, None], one, None, one, None, approximate=approximate)
                      for c in columns])  # fmt: skip
    exact = F.gelu(x.double(), approximate=approximate)
    theirs = F.gelu(x, approximate=approximate)
    error = (ours[:, 0].double() - exact).abs()
    allowed = (theirs.double() - exact).abs().max()
    assert error.max() <= 2 * allowed + torch.finfo(torch.float32).eps
    # next to 0 it is x / 2, to a few roundings of its own size and not of the largest value's
    near = x.abs() < 1e-6
    assert (error[near] <= 4 * torch.finfo(torch.float32).eps * exact[near].abs()).all()


class TestDropout:
    P = 0.4

    def hidden(self, rows: int, p: float) -> torch.Tensor:
        """With w2 the identity, the output is the dropped activation itself."""
        x, w1 = torch.full((rows, 1), 3.0), torch.ones(50, 1)
        return ops.gelu_mlp(x, w1, None, torch.eye(50), None, dropout_p=p)

    def test_rate_scale_and_generator(self) -> None:
        full = self.hidden(200, 0.0)
        torch.manual_seed(1)
        dropped, other = self.hidden(200, self.P), self.hidden(200, self.P)
        gone = (dropped == 0).double().mean().item()
        assert abs(gone - self.P) < 5 * (self.P * (1 - self.P) / dropped.numel()) ** 0.5
        kept = dropped != 0
        assert torch.allclose(dropped[kept], full[kept] / (1 - self.P))
        torch.manual_seed(1)
        assert torch.equal(self.hidden(200, self.P), dropped)
        assert not torch.equal(other, dropped)

    def test_forward_and_backward_use_one_mask(self) -> None:
        shapes = [(3, 4), (6, 4), (6,), (2, 6), (2,)]
        inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

        def fixed(*x: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(3)
            return ops.gelu_mlp(*x, dropout_p=self.P)

        assert torch.autograd.gradcheck(fixed, inputs)
