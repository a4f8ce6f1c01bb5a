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
from fastvlm.decoding.prefixes import decoder_stack

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


class Then(tf.LogitsProcessor):
    """A user's processor that does something to the model at its fourth step."""

    def __init__(self, does: Any) -> None:
        self.steps, self.does = 0, does

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        if self.steps == 4:
            self.does()
        return scores


@pytest.mark.parametrize("beams", [1, 3])
def test_unpatching_in_the_middle(case: Any, beams: int) -> None:
    """Right where rows share nothing; beams that share an image cannot go on, and are told why."""
    model, inputs, expected = case
    wish = {"num_beams": beams, "logits_processor": [Then(lambda: fastvlm.unpatch(model))]}
    if beams > 1 and model.config.is_encoder_decoder:
        with pytest.raises(RuntimeError, match="unpatch when generate"):
            generate(model, inputs, **wish)
    else:
        got = generate(model, inputs, **wish)
        assert torch.equal(got, generate(model, inputs, num_beams=beams))
    assert torch.equal(generate(model, inputs, num_beams=3), expected)


def test_patching_in_the_middle(case: Any) -> None:
    model, inputs, expected = case
    fastvlm.unpatch(model)
    wish = {"num_beams": 3, "logits_processor": [Then(lambda: fastvlm.patch(model))]}
    assert torch.equal(generate(model, inputs, **wish), expected)


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


class Tokens(tf.generation.streamers.BaseStreamer):
    """What is streamed, a list for each step; -1 at the end."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append(-1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("wish", [{}, {"do_sample": True}], ids=["greedy", "sample"])
def test_streaming(case: Any, rows: int, wish: dict[str, Any]) -> None:
    model, inputs, _ = case
    given = {name: value[:rows] for name, value in inputs.items()}
    streams = []
    for patch in (fastvlm.patch, fastvlm.unpatch):
        patch(model)
        streamer = Tokens()
        generate(model, given, streamer=streamer, **wish)
        streams.append(streamer.seen)
    assert streams[0] == streams[1]
    assert streams[0][-1] == -1
    assert [len(step) for step in streams[0][1:-1]] == [rows] * 12


def test_streaming_of_beams_is_what_transformers_says(case: Any) -> None:
    model, inputs, expected = case
    said = []
    for patch in (fastvlm.unpatch, fastvlm.patch):
        patch(model)
        with pytest.raises(ValueError) as error:
            generate(model, inputs, streamer=Tokens(), num_beams=3)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert torch.equal(generate(model, inputs, num_beams=3), expected)


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


@pytest.mark.parametrize("name", ["bart", "florence2", "t5gemma", "florenz"])
@pytest.mark.parametrize("wish", [{"guidance_scale": 1.5}, {"prefill_chunk_size": 3}])
def test_what_one_copy_of_an_image_cannot_serve(name: str, wish: dict[str, Any]) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    expected = generate(model, inputs, num_beams=3)
    fastvlm.patch(model)
    (option,) = wish
    for beams in (1, 3):
        with pytest.raises(ValueError, match=f"{option} must be left out .* fastvlm.unpatch"):
            generate(model, inputs, **wish, num_beams=beams)
    assert torch.equal(generate(model, inputs, num_beams=3, guidance_scale=1), expected)


def test_a_mask_that_does_not_fit_the_encoder_outputs() -> None:
    model = FAMILIES["bart"].build()
    fastvlm.patch(model)
    given = {"encoder_outputs": (torch.randn(3, 5, 32),), "attention_mask": torch.ones(3, 4)}
    with pytest.raises(ValueError, match=r"attention_mask must be \[3, 5\], .* got \[3, 4\]"):
        model(**given, decoder_input_ids=torch.tensor([[2]] * 3))


@pytest.mark.parametrize("both", [False, True], ids=["model", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_an_assistant_model(name: str, both: bool) -> None:
    """Assisted decoding takes several tokens at a time and crops the cache: transformers' path."""
    model, assistant = FAMILIES[name].build(), FAMILIES[name].build()
    inputs = {k: v[:1] for k, v in FAMILIES[name].inputs(model).items()}
    wish = {"assistant_model": assistant, "no_repeat_ngram_size": 0, "max_new_tokens": 20}
    want = generate(model, inputs, no_repeat_ngram_size=0, max_new_tokens=20)
    assert torch.equal(generate(model, inputs, **wish), want)
    fastvlm.patch(model)
    if both:
        fastvlm.patch(assistant)
    assert torch.equal(generate(model, inputs, **wish), want)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_looked_up_in_the_prompt(name: str) -> None:
    """A prefix that repeats itself, so that candidates are found and some of them are wrong."""
    model = FAMILIES[name].build()
    inputs = {k: v[:1] for k, v in FAMILIES[name].inputs(model).items()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[2, 7, 8, 9, 7, 8]])
    lengths = {"max_new_tokens": 30, "min_new_tokens": 30, "no_repeat_ngram_size": 0}
    want = generate(model, inputs, **lengths)
    fastvlm.patch(model)
    decoder, several = decoder_stack(model), []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = next(kwargs[n] for n in ("input_ids", "inputs_embeds") if kwargs.get(n) is not None)
        several.append(given.shape[1])

    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    got = generate(model, inputs, **lengths, prompt_lookup_num_tokens=3)
    handle.remove()
    assert torch.equal(got, want)
    assert max(several[1:]) > 1
