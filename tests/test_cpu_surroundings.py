"""CPU kernels in what surrounds a call: autocast, default dtypes, odd strides, torch.func, NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm import Layout, extension, ops
from fastvlm.cpu import gemm


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not extension.available():
        pytest.skip(f"no CPU extension: {extension.reason()}")


@pytest.mark.parametrize("library", ["aten", "onednn"])
@pytest.mark.parametrize("rows", [7, 100])
def test_the_loss_stays_in_float32_under_autocast(
    rows: int, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gemm.VARIABLE, library)
    h, weight = torch.randn(rows, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    labels = torch.randint(0, 500, (rows,))
    leaves = [t.requires_grad_() for t in (h, weight)]
    with torch.autocast("cpu"):
        loss = ops.linear_cross_entropy(*leaves, labels)
        grads = torch.autograd.grad(loss, leaves)
        top = ops.linear_topk(h.detach(), weight.detach(), 3)
    plain = ops.linear_cross_entropy(*leaves, labels)
    assert torch.equal(loss, plain)
    for got, want in zip(grads, torch.autograd.grad(plain, leaves)):
        assert torch.equal(got, want)
    for got, want in zip(top, ops.linear_topk(h.detach(), weight.detach(), 3)):
        assert torch.equal(got, want)


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    gemm._measure.cache_clear()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default_dtype")
def test_the_default_dtype_does_not_matter() -> None:
    h, weight = (torch.randn(n, 8, dtype=torch.float32) for n in (100, 60))
    labels = torch.arange(100) % 60
    assert ops.linear_cross_entropy(h, weight, labels).dtype == torch.float32
    assert ops.linear_topk(h, weight, 2)[0].dtype == torch.float32
    assert ops.linear(h, weight).dtype == torch.float32


@pytest.mark.parametrize("bias", ["every-second", "expanded"])
def test_any_strides_of_a_bias(bias: str) -> None:
    b = torch.randn(120)[::2] if bias == "every-second" else torch.randn(1).expand(60)
    x, weight, down = torch.randn(3, 8), torch.randn(60, 8), torch.randn(60, 60)
    dense = b.contiguous()
    for run in (
        lambda b: ops.linear(x, weight, b),
        lambda b: ops.gelu_mlp(x, weight, b, down, b),
        lambda b: ops.low_precision_linear(x, *ops.quantize_rows(weight), bias=b),
        lambda b: ops.linear_cross_entropy(x, weight, torch.arange(3), bias=b),
        lambda b: ops.linear_topk(x, weight, 2, bias=b)[0],
    ):
        assert torch.equal(run(b), run(dense))


def empty_sums() -> dict[str, Any]:
    def heads(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    weight = torch.randn(16, requires_grad=True)
    none = Layout.from_lengths([0, 0])
    return {
        "rms_norm": lambda x: ops.rms_norm(x, weight),
        "residual_layer_norm": lambda x: ops.residual_layer_norm(x, x, weight, weight),
        "self_attention": lambda x: ops.self_attention(*(heads(0, 2, 8) for _ in "qkv"), none),
        "rope": lambda x: ops.rope(heads(0, 2, 8), heads(0, 1, 8), x[:, :8].detach(), x[:, 8:])[0],
        "gelu_mlp": lambda x: ops.gelu_mlp(x, torch.randn(9, 16), None, torch.randn(5, 9), None),
        "linear": lambda x: ops.linear(x, torch.randn(9, 16)),
    }


@pytest.mark.parametrize("case", list(empty_sums()))
def test_backward_of_an_empty_sum(case: str) -> None:
    """The gradient of a sum is one number, expanded: strides of zero, and no element."""
    x = torch.randn(0, 16, requires_grad=case != "rope")
    empty_sums()[case](x).sum().backward()


@pytest.mark.parametrize("library", ["aten", "onednn"])
def test_rows_that_overlap(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gemm.VARIABLE, library)
    x, weight = torch.randn(3000).unfold(0, 32, 8), torch.randn(9, 32, requires_grad=True)
    ops.linear(x, weight).sum().backward()
    want = torch.autograd.grad(F.linear(x.clone(), weight).sum(), weight)[0]
    assert torch.allclose(weight.grad, want, atol=1e-3)  # type: ignore[arg-type]


def test_linear_under_torch_func_and_forward_mode() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    grad = torch.func.grad(lambda w: ops.linear(x, w).sum())(weight)
    assert torch.allclose(grad, x.sum(0).expand(5, 8), atol=1e-5)
    _, tangent = torch.func.jvp(lambda w: ops.linear(x, w), (weight,), (torch.ones(5, 8),))
    assert torch.allclose(tangent, x.sum(1, keepdim=True).expand(3, 5), atol=1e-5)


def test_a_window_of_any_size() -> None:
    q = torch.randn(9, 2, 8)
    layout = Layout.from_lengths([9])
    wide = ops.self_attention(q, q, q, layout, causal=False, window=2**63 - 1)
    assert torch.equal(wide, ops.self_attention(q, q, q, layout, causal=False))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1])
def test_a_nan_of_any_bits_stays_one(bits: int) -> None:
    h, weight = torch.randn(2, 4), torch.randn(50, 4)
    weight.view(torch.int32)[7] = bits
    assert ops.linear_cross_entropy(h, weight, torch.tensor([1, 2])).isnan()
    q = torch.randn(20, 1, 8)
    k = q.clone()
    k.view(torch.int32)[2] = bits
    layout = Layout.from_lengths([20])
    assert ops.self_attention(q, k, q, layout, causal=False).isnan().all()


def test_onednn_switched_off_is_not_used() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert gemm.library() == "aten"
    assert gemm.library() in ("aten", "onednn")
