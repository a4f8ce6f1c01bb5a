"""What processors do to a ranking, against what transformers' own make of the scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import generation
from transformers.generation.logits_process import LogitsProcessorList

from fastvlm import ops
from fastvlm.compat.versions import attention_refused

if attention_refused() is not None:
    pytest.skip(str(attention_refused()), allow_module_level=True)

from fastvlm.loss.request import LossRequest
from fastvlm.patching.logits import State
from fastvlm.patching.processors import APPLY, RankedProcessors
from fastvlm.patching.ranked import MOST_RANKED, RankedLogits, RankedScores

IMAGES, BEAMS, VOCAB, WIDTH = 2, 3, 37, 16
ROWS = IMAGES * BEAMS
OUTSIDE = VOCAB + 5  # an embedding may have more rows than the head

# every kind of the table, in more than one state
PROCESSORS: dict[str, Any] = {
    "min-length": generation.MinLengthLogitsProcessor(9, [2, 14]),
    "min-length-over": generation.MinLengthLogitsProcessor(8, 14),
    "min-new-tokens": generation.MinNewTokensLengthLogitsProcessor(2, 7, 14),
    "min-new-tokens-over": generation.MinNewTokensLengthLogitsProcessor(2, 6, 14),
    "suppress": generation.SuppressTokensLogitsProcessor([1, 2, 2, 30, OUTSIDE]),
    "begin": generation.SuppressTokensAtBeginLogitsProcessor([4, 8], 8),
    "begin-over": generation.SuppressTokensAtBeginLogitsProcessor([4, 8], 2),
    "bos": generation.ForcedBOSTokenLogitsProcessor(3),
    "eos": generation.ForcedEOSTokenLogitsProcessor(9, 2),
    "eos-later": generation.ForcedEOSTokenLogitsProcessor(20, 2),
    "no-repeat-1": generation.NoRepeatNGramLogitsProcessor(1),
    "no-repeat-2": generation.NoRepeatNGramLogitsProcessor(2),
    "no-repeat-3": generation.NoRepeatNGramLogitsProcessor(3),
    "no-repeat-longer": generation.NoRepeatNGramLogitsProcessor(9),
}


def test_every_kind_is_here() -> None:
    assert {type(p) for p in PROCESSORS.values()} == set(APPLY)


def logits(dtype: torch.dtype = torch.float32, bias: Tensor | None = None) -> RankedLogits:
    torch.manual_seed(4)
    h, weight = torch.randn(ROWS, 1, WIDTH), nn.Parameter(torch.randn(VOCAB, WIDTH))
    h, weight = h.to(dtype), nn.Parameter(weight.to(dtype), requires_grad=False)
    return RankedLogits(h, weight, bias, LossRequest(), dtype, State.now(h))


def scores_of(lazy: Any, normal: bool) -> Any:
    """As the loops of transformers take them."""
    taken = lazy[:, -1, :].to(copy=True, dtype=torch.float32, device=torch.device("cpu"))
    return F.log_softmax(taken, dim=-1) if normal else taken


def ids(length: int = 8) -> Tensor:
    """Of few tokens, so that n-grams come again."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(3, 6, (ROWS, length), generator=generator)
    tokens[0, :-1] = OUTSIDE  # followed by itself; banned, and in no head
    return tokens


def beams_of(scores: Any, added: Tensor) -> Any:
    scores = torch.reshape(scores, [IMAGES, BEAMS, VOCAB]) + added[:, :, None]
    return torch.reshape(scores, (IMAGES, -1))


def assert_best(lazy: RankedScores, full: Tensor, k: int) -> None:
    values, tokens = torch.topk(lazy, k=k)  # type: ignore[call-overload]
    wanted = full.sort(dim=-1, descending=True, stable=True)
    assert torch.allclose(values, wanted.values[:, :k], atol=1e-5)
    real = wanted.values[:, :k].isfinite()  # the order of tokens that nobody may take is nobody's
    assert torch.equal(tokens[real], wanted.indices[:, :k][real])


@pytest.mark.parametrize("normal", [False, True], ids=["logits", "log-probabilities"])
@pytest.mark.parametrize("first", PROCESSORS)
@pytest.mark.parametrize("then", [None, "suppress", "no-repeat-2", "eos"])
@pytest.mark.parametrize("length", [1, 8])
def test_processors(first: str, then: str | None, length: int, normal: bool) -> None:
    chosen = [PROCESSORS[name] for name in (first, then) if name is not None]
    lazy = scores_of(logits(), normal)
    full = LogitsProcessorList(chosen)(ids(length), scores_of(logits().tensor(), normal))
    found = RankedProcessors(chosen)(ids(length), lazy)
    assert type(lazy) is type(found) is RankedScores
    assert torch.allclose(found.tensor(), full, atol=1e-5)
    assert_best(found, full, 5)
    best = torch.argmax(found, dim=-1)  # type: ignore[arg-type]
    assert torch.equal(full.gather(1, best[:, None]), full.amax(1, keepdim=True))
    added = torch.randn(IMAGES, BEAMS)
    assert_best(beams_of(found, added), beams_of(full, added), 2 * BEAMS)
    assert torch.allclose(beams_of(found, added).tensor(), beams_of(full, added), atol=1e-5)


def test_the_first_step_of_beams() -> None:
    """All beams but one are at -1e9, and none of theirs may be taken."""
    added = torch.tensor([[0.0, -1e9, -1e9]] * IMAGES)
    lazy, full = scores_of(logits(), True), scores_of(logits().tensor(), True)
    assert_best(beams_of(lazy, added), beams_of(full, added), 2 * BEAMS)


def test_equal_scores_go_by_index() -> None:
    lazy = logits()
    with torch.no_grad():
        lazy.weight.copy_(lazy.weight[:1].expand(VOCAB, -1).clone())
    h = lazy.h[:1].expand(ROWS, -1, -1)
    same = RankedLogits(h, lazy.weight, None, LossRequest(), h.dtype, State.now(h))
    scores = RankedProcessors([PROCESSORS["suppress"]])(ids(), scores_of(same, True))
    found = torch.topk(beams_of(scores, torch.zeros(IMAGES, BEAMS)), k=6).indices
    assert found.tolist() == [[0, 3, 4, 5, 6, 7]] * IMAGES


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
def test_bias_and_softcap(bias: bool, softcap: float | None) -> None:
    row = torch.randn(1, VOCAB)
    row[0, :9] = float("-inf")  # how a bias bans
    found = []
    for x in (logits(), logits().tensor()):
        x = x + row if bias else x
        if softcap is not None and not bias:
            x = torch.tanh(x / softcap) * softcap
        found.append(scores_of(x, True))
    lazy, full = found
    assert type(lazy) is RankedScores
    assert_best(lazy, full, 5)


def test_logits_that_are_written_into() -> None:
    lazy, full = logits(), logits().tensor().clone()
    for x in (lazy, full):
        x[..., 3:9] = -50.0
        x.mul_(0.5)
    assert torch.equal(scores_of(lazy, True), scores_of(full, True))
    assert torch.equal((lazy / 3.0) * 2.0, (full / 3.0) * 2.0)
    assert torch.equal(torch.tanh(lazy), torch.tanh(full))  # type: ignore[arg-type]


# what transformers' loops do not ask of them, others may
QUESTIONS: dict[str, Any] = {
    "softmax": lambda x: F.softmax(x, dim=-1),
    "method": lambda x: x.logsumexp(-1),
    "index": lambda x: x[:, 3:5],
    "add": lambda x: x + torch.ones(ROWS, 1),
    "add-number": lambda x: x + 1.0,
    "topk-smallest": lambda x: torch.topk(x, 3, largest=False).values,
    "topk-long": lambda x: torch.topk(torch.cat([x, x], 1), k=MOST_RANKED + 1).values,
    "argmax-of-all": lambda x: torch.argmax(x),
    "log-softmax-0": lambda x: F.log_softmax(x, dim=0),
    "reshape": lambda x: torch.reshape(x, (-1,)),
    "operators": lambda x: (2.0 - x) * 3.0 / (x - x * x) - (-x) ** 2.0 * (x != x),
    "method-in-place": lambda x: x.clone().masked_fill(x > -3.0, 0.0),
    "where": lambda x: torch.where(torch.ones(ROWS, VOCAB, dtype=torch.bool), x, 0.0),
    "size": lambda x: torch.tensor([*x.shape, x.ndim, x.dim(), x.size(1), len(x)]),
    "dtype": lambda x: torch.zeros(1, dtype=x.dtype, device=x.device),
    "processor": lambda x: LogitsProcessorList([generation.TemperatureLogitsWarper(2.0)])(ids(), x),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_other_questions(name: str) -> None:
    ask = QUESTIONS[name]
    lazy, full = scores_of(logits(), True), scores_of(logits().tensor(), True)
    assert torch.allclose(ask(lazy), ask(full), atol=1e-5)


def test_16_bits_are_ranked_by_the_op() -> None:
    lazy = logits(torch.bfloat16)
    values, tokens = torch.topk(scores_of(lazy, True), k=4)
    wanted = ops.linear_topk(lazy.h[:, -1], lazy.weight, 4)
    assert torch.equal(values, wanted[0])
    assert torch.equal(tokens, wanted[1])
