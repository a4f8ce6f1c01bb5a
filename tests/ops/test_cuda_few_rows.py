"""The CUDA kernels that stream a weight once: the MLPs of few rows and linear_topk."""

from __future__ import annotations

from typing import Any

import cuda_emulator
import plain
import pytest
import torch
from torch import Tensor

from fastvlm import ops
from fastvlm.cuda import loss, mlp
from fastvlm.ops.dispatch import BackendError

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("emulated")]
# columns: of no whole block, of one, of several and a tail; depths: of no whole step, of more
# steps than warps share, of both
SIZES = [(5, 8), (8, 16), (37, 48), (64, 304), (100, 1040)]
ROWS = (1, 3, 8, 9, 16)


@pytest.fixture
def emulated(seed: int) -> Any:
    with cuda_emulator.emulated(cuda_emulator.SCHEDULES[seed % 3], seed), torch.no_grad():
        yield


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[1, 3], ids=["whole", "split"])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts of the depth, of which some may have none."""
    monkeypatch.setattr(mlp, "_splits", lambda *args: request.param)
    return request.param


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, splits: int = 1) -> Tensor:
    """What no op calls alone in float16."""
    return torch.ops.fastvlm_cuda.few_rows_linear(x, weight, None, bias, 0, splits)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("hidden", "depth"), SIZES[1::2])
def test_geglu_mlp(
    hidden: int, depth: int, approximate: str, rows: int, splits: int, randn: Any,
    follows_the_error_rule: Any,
) -> None:  # fmt: skip
    scale = depth**-0.5
    follows_the_error_rule(
        lambda *x: ops.geglu_mlp(*x, approximate=approximate),
        lambda *x: plain.geglu_mlp(*x, approximate),
        [
            randn(rows, depth),
            randn(hidden - hidden % 8, depth, scale=scale),
            randn(hidden - hidden % 8, depth, scale=scale),
            randn(13, hidden - hidden % 8, scale=hidden**-0.5),
        ],
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_mlp(
    approximate: str, bias: bool, rows: int, splits: int, randn: Any, follows_the_error_rule: Any
) -> None:
    follows_the_error_rule(
        lambda *x: ops.gelu_mlp(*x, approximate=approximate),
        lambda *x: plain.gelu_mlp(*x, approximate),
        [
            randn(rows, 304),
            randn(72, 304, scale=0.06),
            randn(72) if bias else None,
            randn(19, 72, scale=0.1),
            randn(19) if bias else None,
        ],
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("columns", "depth"), SIZES)
def test_a_weight_as_it_is(
    columns: int, depth: int, rows: int, splits: int, randn: Any, follows_the_error_rule: Any
) -> None:
    follows_the_error_rule(
        lambda x, w, b: linear(x, w, b, splits),
        lambda x, w, b: torch.nn.functional.linear(x, w, b),
        [randn(rows, depth), randn(columns, depth, scale=depth**-0.5), randn(columns)],
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("columns", "depth"), SIZES[1:])
def test_a_weight_of_int8(
    columns: int, depth: int, rows: int, splits: int, randn: Any, follows_the_error_rule: Any
) -> None:
    weight = torch.randint(-128, 128, (columns, depth), dtype=torch.int8)
    scale = torch.rand(columns) * depth**-0.5 / 64
    follows_the_error_rule(
        lambda x, b: ops.low_precision_linear(x, weight, scale, b),
        lambda x, b: torch.nn.functional.linear(
            x, (weight.double() * scale.double()[:, None]).to(x.dtype), b
        ),
        [randn(rows, depth), randn(columns)],
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.usefixtures("splits")
def test_activations_of_int8(rows: int, randn: Any, follows_the_error_rule: Any) -> None:
    gate, up = (torch.randint(-128, 128, (37, 304), dtype=torch.int8) for _ in range(2))
    scale, up_scale = (torch.rand(37) * 304**-0.5 / 64 for _ in range(2))

    def plainly(x: Tensor) -> Tensor:
        parts = ((gate, scale), (up, up_scale))
        wide = [(w.double() * s.double()[:, None]).to(x.dtype) for w, s in parts]
        return torch.nn.functional.gelu(x @ wide[0].t()) * (x @ wide[1].t())

    hidden = torch.ops.fastvlm.low_precision_hidden
    follows_the_error_rule(
        lambda x: hidden(x, gate, scale, None, up, up_scale, False), plainly, [randn(rows, 304)]
    )
    wide = gate.double() * scale.double()[:, None]
    follows_the_error_rule(
        lambda x, b: hidden(x, gate, scale, b, None, None, True),
        lambda x, b: torch.nn.functional.gelu(
            torch.nn.functional.linear(x, wide.to(x.dtype), b), approximate="tanh"
        ),
        [randn(rows, 304), randn(37)],
    )
    with pytest.raises(BackendError, match="a bias of the gate"):
        hidden(randn(rows, 304), gate, scale, randn(37), up, up_scale, True)


def test_splits_fill_the_chip() -> None:
    """Where a weight has few rows, and none where it has many or where there is no depth to split.

    Columns, depth and splits for the 128 multiprocessors that stand for a GPU here.
    """
    x = torch.empty(4, 8, dtype=torch.bfloat16)
    for columns, depth, expected in (
        (768, 768, 3), (768, 3072, 3), (1024, 4096, 2), (2304, 9216, 1), (9216, 2304, 1),
        (64, 4096, 16), (64, 256, 1), (8, 0, 1), (0, 64, 1),
    ):  # fmt: skip
        assert mlp._splits(x, torch.empty(columns, depth, dtype=torch.bfloat16)) == expected


@pytest.mark.usefixtures("splits")
def test_the_same_bits_each_time(randn: Any) -> None:
    x, weight = randn(4, 304), randn(64, 304)
    first = ops.gelu_mlp(x, weight, None, weight.t().contiguous(), None)
    for _ in range(3):
        assert torch.equal(first, ops.gelu_mlp(x, weight, None, weight.t().contiguous(), None))


def test_every_int8_is_exact(dtype: torch.dtype) -> None:
    weight = torch.arange(-128, 128, dtype=torch.int8)[:, None].repeat(1, 16)
    x = torch.zeros(1, 16, dtype=dtype)
    for place in range(16):
        x.zero_()[0, place] = 1
        ours = ops.low_precision_linear(x, weight, torch.ones(256))
        assert torch.equal(ours[0].int(), torch.arange(-128, 128).int())


def test_rows_of_wider_tensors(randn: Any, follows_the_error_rule: Any) -> None:
    follows_the_error_rule(
        lambda x, w: linear(x[::2, 8:56], w[1::3, 16:64], None),
        lambda x, w: x[::2, 8:56] @ w[1::3, 16:64].t(),
        [randn(6, 64), randn(60, 96, scale=0.1)],
    )


TOPK = [
    (1, 5, 8, 5),
    (3, 64, 16, 8),
    (16, 65, 48, 3),
    (17, 200, 304, 8),
    (3, 300, 40, 64),
    (33, 130, 40, 5),
    (64, 130, 16, 1),
]


def topk_scores(h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(h, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits if logits.dtype == torch.float64 else logits.float()


@pytest.mark.parametrize("tiles", [1, 2, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "vocabulary", "depth", "k"), TOPK)
def test_linear_topk(
    rows: int, vocabulary: int, depth: int, k: int, bias: bool, softcap: float | None, tiles: int,
    randn: Any, follows_the_error_rule: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(loss, "_tiles", lambda *args: tiles)
    inputs = [
        randn(rows, depth),
        randn(vocabulary, depth, scale=depth**-0.5),
        randn(vocabulary) if bias else None,
    ]

    def plainly(*x: Any) -> tuple[Tensor, Tensor]:
        scores = topk_scores(*x, softcap)
        return scores.log_softmax(-1).topk(k).values, scores.logsumexp(-1)

    def ours(h: Tensor, weight: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
        values, indices, lse = ops.linear_topk(h, weight, k, bias=b, softcap=softcap)
        # each value is the one of its index
        exact = topk_scores(h.double(), weight.double(), None if b is None else b.double(), softcap)
        found = exact.log_softmax(-1).gather(1, indices)
        assert (values - found).abs().max() < 1e-4
        assert all(row.unique().numel() == k for row in indices)
        return values, lse

    follows_the_error_rule(ours, plainly, inputs)


@pytest.mark.parametrize(("rows", "k"), [(4, 8), (2, 64)])
def test_a_vocabulary_of_the_models(
    rows: int, k: int, randn: Any, follows_the_error_rule: Any
) -> None:
    """256,000 tokens in as many blocks as a GPU would have."""
    inputs = [randn(rows, 8), randn(256_000, 8)]
    assert loss._tiles(inputs[0], 256_000) == 8

    def plainly(h: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        scores = topk_scores(h, weight, None, None)
        best = scores.log_softmax(-1).topk(k).values
        # the scores of our tokens are the best ones, whichever of equal ones they are
        return best, best, scores.logsumexp(-1)

    def ours(h: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        values, indices, lse = ops.linear_topk(h, weight, k)
        assert all(row.unique().numel() == k for row in indices)
        exact = topk_scores(h.double(), weight.double(), None, None).log_softmax(-1)
        return values, exact.gather(1, indices).float(), lse

    follows_the_error_rule(ours, plainly, inputs)


def test_a_row_that_a_bias_rules_out() -> None:
    h, weight = torch.randn(2, 16).half(), torch.randn(130, 16).half()
    lse = ops.linear_topk(h, weight, 3, bias=torch.full((130,), float("-inf")).half())[2]
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_equal_scores_in_ascending_order(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_tiles", lambda *args: tiles)
    weight = torch.randn(200, 16).bfloat16()
    weight[150] = weight[70] = weight[3]
    h = weight[3:4] * 4
    _, indices, _ = ops.linear_topk(h, weight, 60)
    places = [int((indices[0] == i).nonzero()) for i in (3, 70, 150)]
    assert places == [places[0], places[0] + 1, places[0] + 2]


def test_tokens_that_a_bias_rules_out() -> None:
    h, weight, bias = torch.randn(2, 16).half(), torch.randn(130, 16).half(), torch.zeros(130)
    bias[:64] = float("-inf")
    values, indices, lse = ops.linear_topk(h, weight, 5, bias=bias.half())
    assert (indices >= 64).all()
    assert values.isfinite().all()
    exact = (h.double() @ weight[64:].double().t()).logsumexp(-1)
    assert torch.allclose(lse.double(), exact, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "rows", "depth", "dtype"),
    [
        ("17 rows", 17, 16, torch.float16),
        ("float32", 1, 16, torch.float32),
        ("rows of x that do not begin", 1, 12, torch.float16),
    ],
)
def test_what_it_does_not_serve_it_says(
    words: str, rows: int, depth: int, dtype: torch.dtype
) -> None:
    x, w = torch.randn(rows, depth).to(dtype), torch.randn(16, depth).to(dtype)
    with pytest.raises(BackendError, match=words):
        ops.geglu_mlp(x, w, w, torch.randn(4, 16).to(dtype))


def test_training_is_not_served() -> None:
    x, w = torch.randn(2, 16).half().requires_grad_(), torch.randn(16, 16).half()
    with torch.enable_grad(), pytest.raises(BackendError, match="training"):
        ops.gelu_mlp(x, w, None, w, None)
