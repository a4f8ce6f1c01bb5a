"""fastvlm's decoding loop against transformers' on the same model: tokens and scores."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria

import fastvlm
from fastvlm.compat import hf
from fastvlm.compat.versions import attention_refused

if attention_refused() is not None:
    pytest.skip(str(attention_refused()), allow_module_level=True)

from models import FAMILIES, PAD

from fastvlm.decoding.scores import TokenScores
from fastvlm.generate import lean
from fastvlm.patching import generation

KINDS = ("bart", "florence2", "florenz", "gemma2", "t5gemma")
# of a hundred tokens many end a sentence, so that rows end at all lengths
EOS = [2, *range(60, 72)]


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    return {name: FAMILIES[name].build() for name in KINDS}


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step that leaves the model out was given."""
    found: list[int] = []
    call = lean.Lean.__call__

    def noted(self: Any, tokens: Tensor) -> Tensor:
        found.append(tokens.shape[0])
        return call(self, tokens)

    monkeypatch.setattr(lean.Lean, "__call__", noted)
    return found


def drawn(number: int) -> tuple[str, dict[str, Any]]:
    """A family and arguments of generate()."""
    draw = random.Random(number)
    some = lambda *values: draw.choice(values)  # noqa: E731
    beams = some(1, 1, 2, 3, 4)
    settings: dict[str, Any] = {
        "num_beams": beams,
        "max_new_tokens": some(1, 2, 5, 14, 24),
        "eos_token_id": some(2, EOS, EOS, EOS),
        "suppress_tokens": [PAD, *draw.sample(range(20, 60), some(0, 3))],
        "do_sample": some(False, False, beams == 1),
    }
    optional = {
        "min_new_tokens": some(0, 4, 8),
        "no_repeat_ngram_size": some(1, 2, 3),
        "forced_bos_token_id": 4,
        "forced_eos_token_id": 2,
        "begin_suppress_tokens": [5, 6, 2],
        "repetition_penalty": some(1.3, 0.8),
        "bad_words_ids": [[5], [6, 7]],
        "renormalize_logits": True,
        "use_cache": some(True, True, False),
    }
    for name in draw.sample(sorted(optional), some(0, 1, 2, 3)):
        settings[name] = optional[name]
    if beams > 1:
        settings["early_stopping"] = some(True, False, "never")
        settings["length_penalty"] = some(1.0, 1.0, 0.0, -1.0, 2.5)
        settings["num_return_sequences"] = some(1, beams)
    elif settings["do_sample"]:
        settings |= {
            "num_return_sequences": some(1, 3),
            "top_k": some(0, 20),
            "top_p": some(1.0, 0.9),
        }
    if some(True, False, False):
        settings["return_dict_in_generate"] = True
        settings["output_scores"] = some(True, False)
    return some(*KINDS), settings


def written(model: Any, inputs: dict[str, Tensor], settings: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(3)
    out = model.generate(**inputs, **settings)
    if isinstance(out, Tensor):
        return [out]
    names = ("sequences", "sequences_scores", "beam_indices")
    return [x for name in names if (x := getattr(out, name, None)) is not None]


@pytest.mark.turns(10)
@pytest.mark.parametrize("number", range(200))
def test_any_arguments(number: int, built: dict[str, Any]) -> None:
    name, settings = drawn(number)
    model, inputs = built[name], FAMILIES[name].inputs(built[name])
    theirs = written(model, inputs, settings)
    with fastvlm.patched(model):
        ours = written(model, inputs, settings)
    assert len(ours) == len(theirs)
    for mine, wanted in zip(ours, theirs):
        assert mine.dtype == wanted.dtype
        if mine.dtype.is_floating_point:
            assert torch.allclose(mine, wanted, atol=1e-5, rtol=1e-5), settings
        else:
            assert torch.equal(mine, wanted), settings


@pytest.mark.turns(4)
@pytest.mark.parametrize("weights", ["int8", "bf16"])
@pytest.mark.parametrize("number", range(0, 200, 5))
def test_any_arguments_over_weights_of_fewer_bits(
    number: int,
    weights: str,
    built: dict[str, Any],
    moves: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop by itself: transformers' on the same patched model says what is right."""
    name, settings = drawn(number)
    model, inputs = built[name], FAMILIES[name].inputs(built[name])
    with fastvlm.patched(model, weights=weights):
        with monkeypatch.context() as held:
            held.setattr(generation.hf, "takes_own_loop", lambda generate: False)
            theirs = written(model, inputs, settings)
        assert not moves
        ours = written(model, inputs, settings)
    # a step that needs no scores leaves the model out
    scores = settings.get("output_scores", False) or not settings.get("use_cache", True)
    assert moves or scores or settings["max_new_tokens"] <= 2
    assert len(ours) == len(theirs)
    for mine, wanted in zip(ours, theirs):
        if mine.dtype.is_floating_point:
            assert torch.allclose(mine, wanted, atol=1e-5, rtol=1e-5), settings
        else:
            assert torch.equal(mine, wanted), settings


class ByHand(StoppingCriteria):
    """Of the caller's own: the steps go through the model."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_a_head_of_fewer_bits_multiplies_once_a_step(
    built: dict[str, Any], moves: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built["bart"]
    wish = {"num_beams": 2, "max_new_tokens": 9, "min_new_tokens": 9}
    with fastvlm.patched(model, weights="int8"):
        calls: list[int] = []
        kind = type(model.lm_head)
        forward = kind.forward

        def counted(self: Any, x: Tensor) -> Tensor:
            calls.extend([1] * (self is model.lm_head))
            return forward(self, x)

        monkeypatch.setattr(kind, "forward", counted)
        model.generate(**FAMILIES["bart"].inputs(model), **wish, stopping_criteria=[ByHand()])
        assert not moves
        assert len(calls) == 9
        calls.clear()
        model.generate(**FAMILIES["bart"].inputs(model), **wish)
        assert moves
        # the two forwards before the program takes over have multiplied for the model's own
        assert len(calls) == 11


def spread(start: int) -> list[int]:
    """End tokens by which rows of the tiny models end one after the other."""
    return [2, *range(8 + start, 99, 4)]


@pytest.mark.parametrize(
    ("name", "beams", "start"),
    [("bart", 1, 1), ("bart", 3, 1), ("florence2", 1, 3), ("florence2", 3, 3), ("gemma2", 1, 1),
     ("gemma2", 3, 3), ("t5gemma", 1, 1), ("t5gemma", 3, 1)],
)  # fmt: skip
def test_what_has_ended_leaves(
    name: str, beams: int, start: int, built: dict[str, Any], moves: list[int]
) -> None:
    model = built[name]
    inputs = FAMILIES[name].inputs(model)
    wish = {
        "num_beams": beams, "max_new_tokens": 24, "min_new_tokens": 2,
        "eos_token_id": spread(start), "suppress_tokens": [PAD],
    }  # fmt: skip
    if beams > 1:
        wish["early_stopping"] = True
    theirs = model.generate(**inputs, **wish)
    with fastvlm.patched(model):
        ours = model.generate(**inputs, **wish)
        assert torch.equal(ours, theirs)
        left, rows = list(moves), 3 * beams
        moves.clear()
        # who gets the cache finds all rows in it
        kept = model.generate(**inputs, **wish, return_dict_in_generate=True)
    assert torch.equal(kept.sequences, theirs)
    assert set(moves) <= {rows}
    assert left[0] <= rows
    assert min(left) < rows
    assert left == sorted(left, reverse=True)


class Watching(StoppingCriteria):
    def __init__(self) -> None:
        self.rows: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.rows.add(input_ids.shape[0])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("beams", [1, 3])
def test_who_looks_sees_all_rows(beams: int, built: dict[str, Any], moves: list[int]) -> None:
    model = built["bart"]
    inputs = FAMILIES["bart"].inputs(model)
    wish = {"num_beams": beams, "max_new_tokens": 20, "eos_token_id": EOS}
    seen = Watching()
    theirs = model.generate(**inputs, **wish)
    with fastvlm.patched(model):
        ours = model.generate(**inputs, **wish, stopping_criteria=[seen])
    assert torch.equal(ours, theirs)
    assert seen.rows == {3 if beams == 1 else 3 * beams * (1 + len(EOS))}  # all candidates
    assert not moves  # what is watched runs through the model


@pytest.mark.parametrize("sample", [False, True])
def test_notes_of_rows_that_leave(sample: bool, built: dict[str, Any], moves: list[int]) -> None:
    """The scores of `fastvlm.caption` are of all rows, whoever has left."""
    model = built["florence2"]
    inputs = FAMILIES["florence2"].inputs(model)
    wish = {
        "max_new_tokens": 24, "min_new_tokens": 2, "eos_token_id": spread(3),
        "suppress_tokens": [PAD], "do_sample": sample,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    found = []
    for patch in (False, True):
        noted = TokenScores(beams=False)
        with fastvlm.patched(model) if patch else torch.no_grad():
            torch.manual_seed(1)
            out = model.generate(**inputs, **wish, stopping_criteria=[noted]).sequences
        lengths = [
            next((i for i, t in enumerate(r) if t in spread(3)), len(r)) + 1 for r in out[:, 1:]
        ]
        lengths = [min(n, out.shape[1] - 1) for n in lengths]
        found.append((out, [noted.of(row, n, 1.0) for row, n in enumerate(lengths)]))
    (theirs, wanted), (ours, scores) = found
    assert torch.equal(ours, theirs)
    assert scores == pytest.approx(wanted, abs=1e-5)
    assert min(moves) < 3


class TooLong(StoppingCriteria):
    """Ends a row by its own second token, row by row."""

    by_row = True

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] - 2 >= 4 * input_ids[:, 1]


@pytest.mark.parametrize("eos", [None, 98])
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_leave_by_a_criterion_that_looks_at_each(
    beams: int, eos: int | None, built: dict[str, Any], moves: list[int]
) -> None:
    model = built["bart"]
    start = torch.tensor([[2, 5], [2, 1], [2, 3]])
    inputs = {**FAMILIES["bart"].inputs(model), "decoder_input_ids": start}
    wish = {
        "num_beams": beams, "max_new_tokens": 24, "eos_token_id": eos,
        "stopping_criteria": [TooLong()],
    }  # fmt: skip
    theirs = model.generate(**inputs, **wish)
    with fastvlm.patched(model):
        ours = model.generate(**inputs, **wish)
    assert torch.equal(ours, theirs)
    # without an end token greedy rows write on behind their end, as transformers' do
    stay = beams == 1 and eos is None
    assert set(moves) == ({3} if stay else {3 * beams, 2 * beams, beams})


# what stays with transformers' loop
OTHERS: dict[str, dict[str, Any]] = {
    "lookup": {"prompt_lookup_num_tokens": 2},
    "custom": {"custom_generate": lambda model, ids, **_: ids},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_loops(name: str, built: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = built["bart"]
    inputs = {key: x[:1] for key, x in FAMILIES["bart"].inputs(model).items()}
    monkeypatch.setattr(generation, "_decode", None)
    with fastvlm.patched(model):
        model.generate(**inputs, max_new_tokens=4, **OTHERS[name])
        monkeypatch.setattr(hf, "syncs_gpus", lambda model: True)
        model.generate(**inputs, max_new_tokens=4)
