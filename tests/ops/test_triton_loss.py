"""The Triton output head in small blocks: several of them in every dimension, several chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import emulator
import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvlm import ops
from fastvlm.ops.dispatch import BackendError
from fastvlm.triton import configs
from fastvlm.triton.common import dot_precision
from fastvlm.triton.configs.products import tile

pytest.importorskip("triton")
from fastvlm.triton import loss

pytestmark = pytest.mark.triton

# 3 blocks of rows, 4 chunks of 2 blocks of tokens, 2 blocks of features; none of them full
ROWS, WIDTH, VOCABULARY = 37, 23, 100
SMALL = {
    "linear_cross_entropy": tile(16, 32, 16, 4, 2),
    "linear_cross_entropy_dlogits": tile(16, 16, 16, 4, 2),
    "linear_cross_entropy_dh": tile(16, 16, 16, 4, 2),
    "linear_cross_entropy_dweight": tile(32, 16, 16, 4, 2),
    "linear_topk": tile(16, 32, 16, 4, 2),
}
backward = torch.ops.fastvlm.linear_cross_entropy_backward
forward = torch.ops.fastvlm.linear_cross_entropy


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loss, "SCRATCH_BYTES", 0)
    monkeypatch.setattr(loss, "FEWEST_COLUMNS", 32)
    monkeypatch.setattr(loss, "COLUMNS", 32)
    monkeypatch.setattr(loss, "FEWEST_RANKED", 20)
    with configs.replaced(**SMALL), emulator.emulated():
        yield


@pytest.fixture
def labels() -> Tensor:
    """A third of them ignored, the last token and the first one among the rest."""
    labels = torch.randint(0, VOCABULARY, (ROWS,)).masked_fill(torch.rand(ROWS) < 0.3, -100)
    labels[0], labels[-1] = VOCABULARY - 1, 0
    return labels


def cross_entropy_follows(
    rule: Callable[..., None], labels: Tensor, inputs: Any, **kw: Any
) -> None:
    rule(
        lambda h, w, b: ops.linear_cross_entropy(h, w, labels, bias=b, **kw),
        lambda h, w, b: plain.linear_cross_entropy(h, w, labels, bias=b, **kw),
        inputs,
    )


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["nocap", "cap"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_several_blocks(
    bias: bool,
    softcap: float | None,
    small: None,
    labels: Tensor,
    randn: Any,
    follows_the_error_rule: Any,
) -> None:
    inputs = [
        randn(ROWS, WIDTH, grad=True),
        randn(VOCABULARY, WIDTH, grad=True),
        randn(VOCABULARY, grad=True) if bias else None,
    ]
    cross_entropy_follows(follows_the_error_rule, labels, inputs, softcap=softcap, reduction="none")


def test_tiles_that_are_finished_by_halves(randn: Any, follows_the_error_rule: Any) -> None:
    """Those of 128 columns or more: both halves have something in them, the last one not much."""
    rows, width, vocabulary = 20, 150, 230
    inputs = [randn(rows, width, scale=0.3, grad=True), randn(vocabulary, width, grad=True), None]
    labels = torch.randint(0, vocabulary, (rows,))
    wide = dict.fromkeys(SMALL, tile(16, 128, 32, 4, 2))
    with configs.replaced(**wide), emulator.emulated():
        cross_entropy_follows(follows_the_error_rule, labels, inputs, softcap=30.0)


def test_strides(small: None, labels: Tensor, randn: Any, follows_the_error_rule: Any) -> None:
    """Rows of wider tensors, a transposed weight, an expanded gradient (of the sum)."""
    inputs = [
        randn(ROWS, 2 * WIDTH)[:, 1 : 1 + WIDTH].requires_grad_(),
        randn(WIDTH, VOCABULARY).t().requires_grad_(),
        randn(2 * VOCABULARY)[::2].requires_grad_(),
    ]
    spread = torch.stack((labels, labels), 1)[:, 0]
    cross_entropy_follows(follows_the_error_rule, spread, inputs, reduction="sum")
    h, weight = randn(ROWS, WIDTH, grad=True), randn(VOCABULARY, 2 * WIDTH)[:, :WIDTH]
    cross_entropy_follows(follows_the_error_rule, labels, [h, weight.requires_grad_(), None])


def test_large_logits(small: None, labels: Tensor, randn: Any, follows_the_error_rule: Any) -> None:
    """Hundreds, without a cap: probabilities of 0 and 1."""
    inputs = [
        randn(ROWS, WIDTH, scale=8, grad=True),
        randn(VOCABULARY, WIDTH, scale=8, grad=True),
        None,
    ]
    cross_entropy_follows(follows_the_error_rule, labels, inputs)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 17), (17, 3, 2), (16, 16, 32), (63, 100, 33)])
def test_sizes(
    sizes: tuple[int, int, int], small: None, randn: Any, follows_the_error_rule: Any
) -> None:
    rows, width, vocabulary = sizes
    inputs = [
        randn(rows, width, grad=True),
        randn(vocabulary, width, grad=True),
        randn(vocabulary, grad=True),
    ]
    cross_entropy_follows(follows_the_error_rule, torch.randint(0, vocabulary, (rows,)), inputs)


def test_more_blocks_than_are_combined_at_once(
    small: None, randn: Any, follows_the_error_rule: Any
) -> None:
    """Later ones hold larger logits, so the sums of the earlier ones are scaled down."""
    weight = randn(2100, 3) * torch.arange(1, 2101)[:, None].to(torch.float32).sqrt() / 10
    inputs = [randn(3, 3), weight.to(randn(1).dtype), None]
    cross_entropy_follows(follows_the_error_rule, torch.tensor([5, -100, 2099]), inputs)


def test_only_what_is_needed_is_computed(
    small: None, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    h, weight, bias = torch.randn(ROWS, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.randn(100)
    grad = torch.randn(ROWS)
    _, lse = forward(h, weight, labels, bias, 0.0, -100)
    arguments = (grad, h, weight, labels, bias, lse, 0.0, -100, 0.0)
    everything = backward(*arguments, [True] * 3)
    names = ("cross_entropy_dh", "cross_entropy_dweight", "cross_entropy_dbias")
    for needs in itertools.product((True, False), repeat=3):
        with monkeypatch.context() as without:
            for need, name in zip(needs, names):
                if not need:
                    without.setattr(loss.backward, name, None)  # a launch would raise
            for got, want, need in zip(backward(*arguments, list(needs)), everything, needs):
                assert torch.equal(got, want) if need else got.numel() == 0


def test_all_rows_ignored(small: None, dtype: torch.dtype) -> None:
    h, weight = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(VOCABULARY, WIDTH).to(dtype)
    bias, labels = torch.randn(VOCABULARY).to(dtype), torch.full((ROWS,), 7)
    nll, lse = forward(h, weight, labels, bias, 0.0, 7)
    grads = backward(torch.randn(ROWS), h, weight, labels, bias, lse, 0.0, 7, 0.0, [True] * 3)
    assert all((x == 0).all() for x in (nll, lse, *grads))


def test_no_rows(small: None) -> None:
    h, weight, labels = torch.randn(0, 5), torch.randn(9, 5), torch.zeros(0, dtype=torch.int64)
    nll, lse = forward(h, weight, labels, None, 0.0, -100)
    dh, dw, _ = backward(nll, h, weight, labels, None, lse, 0.0, -100, 0.0, [True, True, True])
    assert (nll.shape, dh.shape) == ((0,), (0, 5))
    assert torch.equal(dw, torch.zeros(9, 5))
    assert [x.shape for x in ops.linear_topk(h, weight, 3)] == [(0, 3), (0, 3), (0,)]


def test_ignored_rows_are_not_read(small: None, labels: Tensor, dtype: torch.dtype) -> None:
    """Results are those of the other rows alone, to the bit, whatever the ignored rows hold."""
    h, weight = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(VOCABULARY, WIDTH).to(dtype)
    counts = labels != -100
    h[~counts] = float("nan")
    grad = torch.rand(ROWS).masked_fill(~counts, float("nan"))
    few = h[counts], weight, labels[counts]
    both, alone = forward(h, weight, labels, None, 0.0, -100), forward(*few, None, 0.0, -100)
    assert all(torch.equal(x[counts], y) and (x[~counts] == 0).all() for x, y in zip(both, alone))
    needs = [True, True, False]
    dh, dw, _ = backward(grad, h, weight, labels, None, both[1], 0.0, -100, 0.0, needs)
    dx, dv, _ = backward(grad[counts], *few, None, alone[1], 0.0, -100, 0.0, needs)
    assert torch.equal(dh[counts], dx)
    assert (dh[~counts] == 0).all()
    assert torch.equal(dw, dv)


def test_small_gradients_survive_float16(small: None) -> None:
    """A probability of 1/64 in a mean of a million is 1.5e-8: nothing, in float16."""
    rows, tokens = 20, 64
    h, weight = torch.full((rows, 8), 200.0).half(), torch.zeros(tokens, 8).half()
    labels, grad = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), 1e-6)
    _, lse = forward(h, weight, labels, None, 0.0, -100)
    _, dw, _ = backward(grad, h, weight, labels, None, lse, 0.0, -100, 0.0, [False, True, False])
    want = torch.tensor(rows * 200 * 1e-6 / tokens).half()
    assert (dw[1:] == want).all()


def test_nothing_waits_for_the_device(small: None, labels: Tensor) -> None:
    """Which rows count is never asked on the host, so a CUDA graph may hold all of it."""

    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()

        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.add(f.overloadpacket.__name__)
            return f(*args, **(kwargs or {}))

    launch = loss.LAUNCHERS
    h, weight = torch.randn(ROWS, WIDTH), torch.randn(VOCABULARY, WIDTH)
    with Calls() as calls:
        _, lse = launch["linear_cross_entropy"].run(h, weight, labels, None, 0.0, -100)
        launch["linear_cross_entropy_backward"].run(
            torch.ones(ROWS), h, weight, labels, None, lse, 0.0, -100, 0.0, [True, True, False]
        )
        launch["linear_topk"].run(h, weight, 4, None, 0.0)
    assert calls.names
    assert not calls.names & {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"}


@pytest.mark.parametrize("k", [1, 5, 32, 40, 64])
def test_topk_of_several_blocks(
    k: int, small: None, randn: Any, follows_the_error_rule: Any
) -> None:
    """Fewer than a block holds, all of it, and more."""
    inputs = [randn(ROWS, WIDTH), randn(VOCABULARY, WIDTH), randn(VOCABULARY)]

    def log_probabilities(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(h, w, b)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.log_softmax(-1), logits.logsumexp(-1)

    values, indices, lse = ops.linear_topk(*inputs[:2], k, bias=inputs[2])

    def largest(*x: Tensor) -> tuple[Tensor, Tensor]:
        return log_probabilities(*x)[0].topk(k).values, log_probabilities(*x)[1]

    follows_the_error_rule(lambda *x: (values, lse), largest, inputs)
    follows_the_error_rule(
        lambda *x: values, lambda *x: log_probabilities(*x)[0].gather(1, indices), inputs
    )
    assert all(len(set(row)) == k for row in indices.tolist())


def test_ties_come_in_ascending_order(small: None) -> None:
    """Within a block and across them; tokens of probability 0 come last."""
    h, weight, bias = torch.ones(2, 2), torch.zeros(VOCABULARY, 2), torch.zeros(VOCABULARY)
    weight[[7, 3, 64, 99]] = 1.0
    bias[[0, 40]] = float("-inf")
    values, indices, _ = ops.linear_topk(h, weight, 7, bias=bias)
    assert indices.tolist() == 2 * [[3, 7, 64, 99, 1, 2, 4]]
    assert (values[:, 1:4] == values[:, :1]).all()
    values, indices, _ = ops.linear_topk(h, weight[:50], 50, bias=bias[:50])
    assert indices[:, -2:].tolist() == 2 * [[0, 40]]
    assert values[:, -2:].isneginf().all()


def test_topk_says_what_it_cannot_do(small: None) -> None:
    with pytest.raises(BackendError, match="k of 65"):
        ops.linear_topk(torch.randn(1, 2), torch.randn(99, 2), 65)


def test_chunks_are_small_but_not_too_small() -> None:
    def columns(rows: int, vocabulary: int, d: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return loss.chunk_columns(rows, torch.empty(vocabulary, d, dtype=dtype, device="meta"))

    for dtype in (torch.bfloat16, torch.float32):
        wide = columns(4096, 256000, 2304, dtype)
        assert 4 * 4096 * wide <= 256000 * 2304 < 4 * 4096 * (wide + 4096)
        assert 7 * wide < 256000 <= 8 * wide
    # of a narrow weight a quarter is little; the last chunk is as long as the others, or nearly
    narrow = columns(4096, 257024, 256)
    assert narrow * 4096 * 2 <= loss.SCRATCH_BYTES < 2 * narrow * 4096 * 2
    assert -(-257024 // narrow) * narrow - 257024 < loss.COLUMNS * -(-257024 // narrow)
    assert columns(2**20, 257024, 2304) <= loss.FEWEST_COLUMNS < 2 * columns(2**20, 257024, 2304)
    assert columns(5, 63, 7, torch.float32) == loss.COLUMNS


def test_float32_products_follow_the_setting_of_pytorch() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert dot_precision(torch.zeros(1)) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert dot_precision(torch.zeros(1)) == "tf32"
        assert dot_precision(torch.zeros(1, dtype=torch.bfloat16)) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("family", configs.FAMILIES)
def test_every_call_has_a_config(family: str) -> None:
    with configs.assumed(family):
        for kernel, rows, wide in itertools.product(SMALL, (1, 16, 32, 64, 4096), (0, 1)):
            assert configs.options(kernel, torch.zeros(1), rows=rows, wide=wide)


def test_an_infinite_gradient_stays_in_its_row(small: None) -> None:
    h = torch.randn(4, WIDTH, requires_grad=True)
    weight, labels = torch.randn(VOCABULARY, WIDTH), torch.arange(4)
    loss_of_rows = ops.linear_cross_entropy(h, weight, labels, reduction="none")
    loss_of_rows.backward(torch.tensor([1.0, float("inf"), 1.0, 1.0]))
    assert h.grad is not None
    assert h.grad.isfinite().all(1).tolist() == [True, False, True, True]
