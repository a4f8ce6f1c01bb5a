"""What goes wrong in generate(): right output or a clear error, and the model usable afterwards."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers as tf
from models import FAMILIES
from test_families import generate
from torch import Tensor, nn

import fastvlm

NAMES = ["bart", "florence2", "t5gemma", "gemma2", "florenz"]


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A patched model, inputs, and the tokens that it gives before anything goes wrong."""
    model = FAMILIES[request.param].build()
    inputs = FAMILIES[request.param].inputs(model)
    expected = generate(model, inputs, num_beams=3)
    fastvlm.patch(model)
    return model, inputs, expected


class Stop(Exception):
    pass


class After(tf.LogitsProcessor):
    """A user's processor that fails, or is interrupted, at its n-th step."""

    def __init__(self, steps: int, error: type[BaseException]) -> None:
        self.left, self.error = steps, error

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return scores


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_exception_in_the_middle(case: Any, error: type[BaseException]) -> None:
    model, inputs, expected = case
    with pytest.raises(error):
        generate(model, inputs, num_beams=3, logits_processor=[After(4, error)])
    assert torch.equal(generate(model, inputs, num_beams=3), expected)


def test_two_threads_on_one_model(case: Any) -> None:
    model, inputs, expected = case
    found: dict[int, Any] = {}

    def run(number: int) -> None:
        try:
            wish = {"num_beams": 3, "max_new_tokens": 12, "min_new_tokens": 12}
            found[number] = model.generate(
                **inputs, **wish, no_repeat_ngram_size=2, suppress_tokens=[1]
            )
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected) for number in range(3)), found


def test_a_stopping_criterion_of_the_users(case: Any) -> None:
    model, inputs, expected = case

    class Five(tf.StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            done = input_ids.shape[1] >= start + 5
            return torch.full((input_ids.shape[0],), done)

    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    got = generate(model, inputs, stopping_criteria=[Five()], min_new_tokens=0)
    assert got.shape[1] == start + 5
    assert torch.equal(generate(model, inputs, num_beams=3), expected)


def test_an_end_token_at_the_first_step(case: Any) -> None:
    model, inputs, expected = case
    fastvlm.unpatch(model)
    wish = {"num_beams": 3, "min_new_tokens": 0, "forced_eos_token_id": None}
    first = int(generate(model, inputs, max_new_tokens=1, min_new_tokens=1)[0, -1])
    want = generate(model, inputs, **wish, eos_token_id=first)
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, **wish, eos_token_id=first), want)
    assert torch.equal(generate(model, inputs, num_beams=3), expected)


def test_no_new_tokens_is_what_transformers_says(case: Any) -> None:
    model, inputs, _ = case
    outcomes = []
    for patch in (fastvlm.patch, fastvlm.unpatch):
        patch(model)
        try:
            outcomes.append(generate(model, inputs, max_new_tokens=0, min_new_tokens=0).tolist())
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_rows_that_end_at_different_steps(case: Any) -> None:
    model, inputs, _ = case
    fastvlm.unpatch(model)
    tokens = generate(model, inputs)
    ends = sorted({int(tokens[0, -4]), int(tokens[1, -8])})
    wish = {"min_new_tokens": 0, "eos_token_id": ends, "num_beams": 2}
    want = generate(model, inputs, **wish)
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, **wish), want)


def test_streaming(case: Any) -> None:
    model, inputs, _ = case

    class Tokens(tf.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    one = {name: value[:1] for name, value in inputs.items()}
    streams = []
    for patch in (fastvlm.patch, fastvlm.unpatch):
        patch(model)
        streamer = Tokens()
        generate(model, one, streamer=streamer)
        streams.append(streamer.seen)
    assert streams[0] == streams[1]
    assert streams[0][-1] == -1


def test_allowed_tokens_and_forced_ones(case: Any) -> None:
    model, inputs, _ = case

    def allowed(row: int, ids: Tensor) -> list[int]:
        return [7 + row, 20, 30, 40 + len(ids) % 5, 2]

    wish = {"prefix_allowed_tokens_fn": allowed, "num_beams": 3, "forced_bos_token_id": 20}
    tokens = []
    for patch in (fastvlm.patch, fastvlm.unpatch):
        patch(model)
        tokens.append(generate(model, inputs, **wish, no_repeat_ngram_size=0))
    assert torch.equal(*tokens)


def test_an_assistant_model() -> None:
    """Assisted decoding takes several tokens at a time and crops the cache: transformers' path."""
    model, assistant = FAMILIES["gemma2"].build(), FAMILIES["gemma2"].build()
    inputs = {k: v[:1] for k, v in FAMILIES["gemma2"].inputs(model).items()}
    wish = {"assistant_model": assistant, "no_repeat_ngram_size": 0}
    want = generate(model, inputs, **wish)
    fastvlm.patch(model)
    fastvlm.patch(assistant)
    assert torch.equal(generate(model, inputs, **wish), want)
