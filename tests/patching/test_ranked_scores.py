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

from fastvlm.generate.bans import KNOWN, NONE, Bans, unknown
from fastvlm.generate.head import (
    Head,
    Last,
    best_lists_of_rows,
    best_of_rows,
    best_token_of_rows,
    mask_logits,
)
from fastvlm.generate.ranking import best_in_python, best_of_images
from fastvlm.generate.searches import descending, float32, over
from fastvlm.loss.request import LossRequest
from fastvlm.patching.logits import State
from fastvlm.patching.recorded import RecordedLogits

IMAGES, BEAMS, VOCAB, WIDTH = 2, 3, 37, 16
ROWS = IMAGES * BEAMS
INF, NAN = float("inf"), float("nan")
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
    assert {type(p) for p in PROCESSORS.values()} == set(KNOWN)
    assert unknown(PROCESSORS.values()) is None
    assert unknown([generation.TemperatureLogitsWarper(2.0)]) == "TemperatureLogitsWarper"


def last(dtype: torch.dtype = torch.float32, **head: Any) -> Last:
    torch.manual_seed(4)
    module = nn.Linear(WIDTH, VOCAB, bias=False).to(dtype).requires_grad_(False)
    module.weight.data.normal_()
    return Last(torch.randn(ROWS, WIDTH).to(dtype), Head(module, dtype=dtype, **head))


def ids(length: int = 8) -> Tensor:
    """Of few tokens, so that n-grams come again."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(3, 6, (ROWS, length), generator=generator)
    tokens[0, :-1] = OUTSIDE  # followed by itself; banned, and in no head
    return tokens


def grown(processors: list[Any], tokens: Tensor) -> Any:
    """What is banned behind tokens, told from the first column on, one by one."""
    rows = tokens[:, :1].tolist()
    bans = Bans(processors, rows)
    for column in tokens.T[1:].tolist():
        rows = [[*row, token] for row, token in zip(rows, column)]
        bans.grow(None, rows)
    at_once = Bans(processors, rows).next(rows)
    assert at_once == bans.next(rows)
    return at_once


def assert_best(found: tuple[Tensor, Tensor], full: Tensor, k: int) -> None:
    values, order = found[0].sort(dim=-1, descending=True, stable=True)
    tokens = found[1].gather(1, order)
    wanted = full.sort(dim=-1, descending=True, stable=True)
    assert torch.allclose(values[:, :k], wanted.values[:, :k], atol=1e-5)
    real = wanted.values[:, :k].isfinite()  # the order of tokens that nobody may take is nobody's
    assert torch.equal(tokens[:, :k][real], wanted.indices[:, :k][real])


@pytest.mark.parametrize("first", PROCESSORS)
@pytest.mark.parametrize("then", [None, "suppress", "no-repeat-2", "eos"])
@pytest.mark.parametrize("length", [1, 8])
def test_processors(first: str, then: str | None, length: int) -> None:
    chosen, x = [PROCESSORS[name] for name in (first, then) if name is not None], last()
    scores = F.log_softmax(x.all_logits(), dim=-1)
    full = LogitsProcessorList(chosen)(ids(length), scores)
    banned = grown(chosen, ids(length))
    assert torch.allclose(mask_logits(scores.clone(), banned), full, atol=1e-5)
    found = best_of_rows(x, 5, banned)
    assert_best(found, full, 5)
    assert best_lists_of_rows(x, 5, banned) == tuple(each.tolist() for each in found)
    assert best_token_of_rows(x, banned) == full.argmax(1).tolist()
    running = torch.randn(IMAGES, BEAMS)
    of_images = (full.view(IMAGES, BEAMS, VOCAB) + running[:, :, None]).view(IMAGES, -1)
    found = best_of_images(x, running, 2 * BEAMS, banned)
    assert_best(found, of_images, 2 * BEAMS)
    assert best_in_python(x, running.tolist(), 2 * BEAMS, banned) == in_lists(*found)


def in_lists(values: Tensor, places: Tensor) -> list[list[tuple[int, int, float]]]:
    return [
        [(place // VOCAB, place % VOCAB, value) for place, value in zip(*each)]
        for each in zip(places.tolist(), values.tolist())
    ]


def test_beams_that_change_places() -> None:
    """A table of n-grams goes with its row, to as many as go on from it."""
    rows = [[3, 4, 3], [5, 6, 5], [7, 8, 9]]
    bans = Bans([PROCESSORS["no-repeat-2"]], rows)
    rows = [[5, 6, 5, 3], [5, 6, 5, 5], [3, 4, 3, 9]]
    bans.grow([1, 1, 0], rows)
    rows = [[5, 6, 5, 3, 5], [5, 6, 5, 5, 5], [3, 4, 3, 9, 3]]
    bans.grow(None, rows)
    assert bans.next(rows).of_rows == [[6, 3], [6, 5], [4, 9]]
    bans.keep([2, 0])
    assert bans.next([rows[2], rows[0]]).of_rows == [[4, 9], [6, 3]]


def test_the_first_step_of_beams() -> None:
    """All beams but one are at -1e9, and none of theirs may be taken."""
    running, x = torch.tensor([[0.0, -1e9, -1e9]] * IMAGES), last()
    full = F.log_softmax(x.all_logits(), dim=-1).view(IMAGES, BEAMS, -1) + running[:, :, None]
    assert_best(best_of_images(x, running, 6, NONE), full.view(IMAGES, -1), 6)


def test_equal_scores_go_by_index() -> None:
    x = last()
    x.head.module.weight.copy_(x.head.module.weight[:1].expand(VOCAB, -1).clone())
    same = Last(x.states[:1].expand(ROWS, -1), x.head)
    banned = grown([PROCESSORS["suppress"]], ids())
    found = best_of_images(same, torch.zeros(IMAGES, BEAMS), 6, banned)
    assert found[1].tolist() == [[0, 3, 4, 5, 6, 7]] * IMAGES
    assert best_in_python(same, [[0.0] * BEAMS] * IMAGES, 6, banned) == in_lists(*found)


@pytest.mark.parametrize("values", [
    [1.0, 3.0, 2.0], [2.0, 5.0, 5.0, 2.0], [1.0, NAN, 7.0, NAN], [-INF, -1e9, INF],
])  # fmt: skip
def test_numbers_are_put_in_order_as_pytorch_does(values: list[float]) -> None:
    wanted = torch.tensor(values).sort(descending=True, stable=True).indices
    assert descending(values) == wanted.tolist()


def test_python_rounds_as_float32_does() -> None:
    a, b = torch.randn(2, 4000) * 2.0 ** torch.randint(-20, 20, (2, 4000))
    pairs = list(zip(a.tolist(), b.tolist()))
    assert float32([x + y for x, y in pairs]) == (a + b).tolist()
    assert float32([x / y for x, y in pairs]) == (a / b).tolist()
    for by in (3.7, 1e-30, 0.0, 1e-60, 7):
        some = [*a[:9].tolist(), -INF]
        assert over(some, by) == (torch.tensor(some) / by).tolist()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("added", [False, True])
def test_bias_and_softcap(added: bool, softcap: float | None) -> None:
    row = torch.randn(1, VOCAB)
    row[0, :9] = float("-inf")  # how a bias bans
    if added and softcap is not None:
        return  # no model does both
    x = last(added=row if added else None, softcap=softcap)
    logits = x.head.module(x.states)
    logits = logits + row if added else logits
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    assert torch.equal(x.all_logits(), logits)
    assert_best(best_of_rows(x, 5, NONE), F.log_softmax(logits, dim=-1), 5)


def recorded(x: Last) -> RecordedLogits:
    weight, h = x.head.module.weight, x.states.unsqueeze(1)
    return RecordedLogits(h, weight, None, LossRequest(), h.dtype, State.now(h), head=x.head.module)


# what models do between their head and their logits, and whether it is written down
FORWARDS: dict[str, tuple[Any, bool]] = {
    "nothing": (lambda y: y, True),
    "bias": (lambda y: y + torch.arange(VOCAB).view(1, VOCAB) / 9, True),
    "softcap": (lambda y: torch.tanh(y / 5.0) * 5.0, True),
    "float": (lambda y: y.float().contiguous(), True),
    "half-a-softcap": (lambda y: torch.tanh(y / 5.0), False),
    "scaled": (lambda y: y * 0.5, False),
    "divided": (lambda y: (y / 3.0) * 2.0, False),
    "two-biases": (lambda y: (y + torch.ones(VOCAB)) + torch.ones(VOCAB), False),
    "scores": (lambda y: F.log_softmax(y, dim=-1), False),
    "indexed": (lambda y: y[:, -1:], False),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_what_a_forward_does_to_its_logits(name: str) -> None:
    forward, known = FORWARDS[name]
    x = last()
    found, wanted = forward(recorded(x)), forward(x.all_logits().unsqueeze(1))
    assert isinstance(found, RecordedLogits) == known or name == "half-a-softcap"
    if isinstance(found, RecordedLogits):
        read = found.last()
        assert (read.head is not None) == known
        assert torch.equal(read.all_logits(), wanted[:, -1])
    else:
        assert torch.equal(found, wanted)


def test_logits_that_are_written_into() -> None:
    x = last()
    lazy, full = recorded(x), x.all_logits().unsqueeze(1).clone()
    for each in (lazy, full):
        each[..., 3:9] = -50.0
        each.mul_(0.5)
    read = lazy.last()
    assert read.head is None
    assert torch.equal(read.all_logits(), full[:, -1])
    assert torch.equal((lazy / 3.0) * 2.0, (full / 3.0) * 2.0)
    assert torch.equal(torch.tanh(lazy), torch.tanh(full))  # type: ignore[arg-type]


def test_16_bits_are_ranked_by_the_op() -> None:
    x = last(torch.bfloat16)
    found = best_of_rows(x, 4, NONE)
    wanted = ops.linear_topk(x.states, x.head.module.weight, 4)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
