"""linear_cross_entropy and linear_topk against full logits."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as F

import fastvlm
from fastvlm import extension, ops
from fastvlm.cpu import loss as kernels
from fastvlm.reference import loss as reference

# rows, width, vocabulary; one beyond a block of the reference. With few rows the largest error is
# that of the one row whose best two tokens are all but tied, in PyTorch's result as in ours: which
# of the two is luckier says nothing, and differs from one processor to the next. Nor may all
# rows but one be ignored: the reference would multiply it alone, which MKL sums one after another.
SHAPES = {"small": (29, 17, 63), "odd": (61, 64, 577), "blocks": (9, 8, 2 * reference.BLOCK + 3)}


def labels_for(rows: int, vocabulary: int, ignored: float) -> torch.Tensor:
    labels = torch.randint(0, vocabulary, (rows,))
    labels[0] = vocabulary - 1
    return labels.masked_fill(torch.rand(rows) < ignored, -100) if ignored else labels


@pytest.mark.turns(2)
@pytest.mark.parametrize("scale", [1.0, 6.0], ids=["flat", "confident"])
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["nocap", "cap"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("ignored", [0.0, 0.6])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_linear_cross_entropy(
    shape: str,
    ignored: float,
    bias: bool,
    softcap: float | None,
    scale: float,
    on: Any,
    randn: Any,
    follows_the_error_rule: Any,
) -> None:
    rows, width, vocabulary = SHAPES[shape]
    labels = labels_for(rows, vocabulary, ignored)
    labels[-1] = 0  # at least one counts
    inputs = [
        randn(rows, width, scale=scale, grad=True),
        randn(vocabulary, width, grad=True),
        randn(vocabulary, grad=True) if bias else None,
    ]
    # how rows are reduced does not depend on the blocks of the vocabulary
    for reduction in ("mean", "sum", "none") if shape == "small" else ("mean",):
        settings = {"softcap": softcap, "reduction": reduction}
        follows_the_error_rule(
            lambda h, w, b, s=settings: on(ops.linear_cross_entropy, h, w, labels, bias=b, **s),
            lambda h, w, b, s=settings: plain.linear_cross_entropy(h, w, labels, bias=b, **s),
            inputs,
        )


@pytest.mark.parametrize("skip", [False, 1e-9], ids=["all", "live"])
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["nocap", "cap"])
@pytest.mark.parametrize(
    ("kind", "tiles"),
    [("float32", False), ("float16", False), ("bfloat16", False), ("bfloat16", True)],
)
def test_more_rows_than_stream_over_several_blocks(
    kind: str,
    tiles: bool,
    softcap: float | None,
    skip: bool | float,
    monkeypatch: pytest.MonkeyPatch,
    follows_the_error_rule: Any,
) -> None:
    """tiles: as on a CPU with AMX. live: tokens whose gradients matter to nothing are left out."""
    if not extension.available():
        pytest.skip(extension.reason() or "")
    monkeypatch.setattr(kernels, "in_tiles", lambda rows: tiles)
    monkeypatch.setattr(kernels, "may_pack", lambda: True)
    rows, width, vocabulary = 130, 33, kernels._MOST + 300
    labels = labels_for(rows, vocabulary, 0.3)
    dtype = getattr(torch, kind)
    shapes = (rows, width), (vocabulary, width), (vocabulary,)
    inputs = [(torch.randn(shape) * 2).to(dtype).requires_grad_() for shape in shapes]

    def ours(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        with fastvlm.use("cpu"):
            return ops.linear_cross_entropy(
                h, w, labels, bias=b, softcap=softcap, skip_tiny_gradients=skip
            )

    follows_the_error_rule(
        ours,
        lambda h, w, b: plain.linear_cross_entropy(h, w, labels, bias=b, softcap=softcap),
        inputs,
    )


@pytest.mark.parametrize("label", [-1, -100, 63, 1 << 32], ids=str)
def test_a_label_outside_of_the_vocabulary_is_nan(label: int, on: Any) -> None:
    """Not a plausible number: -1 is ignored by some trainers, and is then no ignore_index here."""
    h, weight = torch.randn(20, 17, requires_grad=True), torch.randn(63, 17, requires_grad=True)
    labels = torch.randint(0, 63, (20,))
    labels[[3, 11]] = torch.tensor([label, -7])
    settings = {"reduction": "none", "ignore_index": -7}
    loss = on(ops.linear_cross_entropy, h, weight, labels, softcap=3.0, **settings)
    good = torch.arange(20) != 3
    assert loss[3].isnan()
    assert loss[good].isfinite().all()
    assert loss[11] == 0
    dh, dw = torch.autograd.grad(loss.sum(), (h, weight))
    assert dh[3].isnan().all()
    assert dh[good].isfinite().all()
    assert dw.isnan().all()


def test_no_row_counts() -> None:
    h, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels = torch.full((3,), -100)
    assert ops.linear_cross_entropy(h, weight, labels).isnan()
    loss = ops.linear_cross_entropy(h, weight, labels, reduction="sum")
    loss.backward()
    assert loss == 0
    assert h.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0
    empty = ops.linear_cross_entropy(h[:0], weight, labels[:0], reduction="none")
    assert empty.shape == (0,)


def test_a_vocabulary_that_begins_with_a_block_of_masked_tokens() -> None:
    """A bias of -inf takes tokens out; the sums start with nothing in them."""
    h, weight = torch.randn(3, 4), torch.randn(reference.BLOCK + 9, 4)
    bias = torch.zeros(reference.BLOCK + 9)
    bias[: reference.BLOCK] = float("-inf")
    logits, labels = h @ weight[reference.BLOCK :].t(), torch.tensor([0, 8, 3])
    loss = ops.linear_cross_entropy(h, weight, labels + reference.BLOCK, bias=bias)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    values, indices, lse = ops.linear_topk(h, weight, 2, bias=bias)
    torch.testing.assert_close(values, logits.log_softmax(-1).topk(2).values)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    assert indices.min() >= reference.BLOCK


def test_another_ignore_index() -> None:
    h, weight, labels = torch.randn(4, 8), torch.randn(9, 8), torch.tensor([1, 7, 7, 2])
    want = F.cross_entropy(h @ weight.t(), labels, ignore_index=7)
    assert torch.allclose(ops.linear_cross_entropy(h, weight, labels, ignore_index=7), want)


def test_groups() -> None:
    """The loss of each (task, language), from the same pass, differentiable like the loss."""
    h = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 8, dtype=torch.float64)
    labels = torch.randint(0, 31, (9,)).masked_fill(torch.arange(9) % 4 == 3, -100)
    groups = torch.tensor([0, 2, 2, 0, 3, 3, 3, 2, 0])
    loss, sums, counts = ops.linear_cross_entropy(h, weight, labels, groups=groups, num_groups=5)
    each = F.cross_entropy(h @ weight.t(), labels, reduction="none")
    for group in range(5):
        assert torch.allclose(sums[group], each[groups == group].sum())
        assert counts[group] == ((groups == group) & (labels >= 0)).sum()
    assert torch.allclose(loss, sums.sum() / counts.sum())
    (sums * torch.arange(5)).sum().backward()
    want = torch.autograd.grad((each * groups).sum(), h)[0]
    assert torch.allclose(h.grad, want)


@pytest.mark.parametrize("scale", [1.0, 6.0], ids=["flat", "confident"])
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["nocap", "cap"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_linear_topk(
    shape: str,
    bias: bool,
    softcap: float | None,
    scale: float,
    on: Any,
    randn: Any,
    follows_the_error_rule: Any,
) -> None:
    rows, width, vocabulary = SHAPES[shape]
    inputs = [
        randn(rows, width, scale=scale),
        randn(vocabulary, width),
        randn(vocabulary) if bias else None,
    ]
    k = min(9, vocabulary)

    def logits(h: torch.Tensor, weight: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        scores = F.linear(h, weight, b)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        return scores if scores.dtype == torch.float64 else scores.float()

    def theirs(*x: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits(*x)
        return scores.log_softmax(-1).topk(k).values, scores.logsumexp(-1)

    picked = torch.empty(0)

    def ours(
        h: torch.Tensor, weight: torch.Tensor, b: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal picked
        values, picked, lse = on(ops.linear_topk, h, weight, k, bias=b, softcap=softcap)
        assert all(len(set(row.tolist())) == k for row in picked)
        return values, lse

    follows_the_error_rule(ours, theirs, inputs)
    # the tokens that were picked have the values that were returned
    follows_the_error_rule(
        lambda *x: ours(*x)[0], lambda *x: logits(*x).log_softmax(-1).gather(1, picked), inputs
    )


def test_ties_come_in_order_and_k_may_be_the_vocabulary() -> None:
    h, weight = torch.ones(1, 2), torch.zeros(reference.BLOCK + 5, 2)
    weight[[7, 3, reference.BLOCK + 1]] = 1.0
    _, indices, _ = ops.linear_topk(h, weight, 4)
    assert indices.tolist() == [[3, 7, reference.BLOCK + 1, 0]]
    values, indices, _ = ops.linear_topk(h, weight[:9], 9)
    assert sorted(indices[0].tolist()) == list(range(9))
    assert torch.allclose(values.exp().sum(), torch.tensor(1.0))


def test_topk_has_no_gradient_and_says_so() -> None:
    h, weight = torch.randn(2, 4, requires_grad=True), torch.randn(9, 4)
    with pytest.raises(RuntimeError, match="linear_topk has no gradient"):
        ops.linear_topk(h, weight, 3)
    with torch.no_grad():
        ops.linear_topk(h, weight, 3)
