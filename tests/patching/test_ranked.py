"""generate() of a patched model ranks without logits, and finds what logits would have given."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import EOS, FAMILIES, PAD, VOCAB, Family, bart, florence2, gemma2, t5gemma
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessor, StoppingCriteria

import fastvlm
from fastvlm import ops
from fastvlm.compat.versions import attention_refused
from fastvlm.decoding.scores import TokenScores
from fastvlm.patching import generation

pytestmark = pytest.mark.skipif(attention_refused() is not None, reason=str(attention_refused()))

STEPS = 12
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-repeat": {"no_repeat_ngram_size": 2},
    "no-repeat-single": {"no_repeat_ngram_size": 1},
    "min-new-tokens": {"min_new_tokens": 9},
    "min-length": {"min_length": 12},
    "suppress": {"suppress_tokens": [PAD, EOS, 7, 8, 9]},
    "begin": {"begin_suppress_tokens": [5, 6, EOS]},
    "forced": {"forced_bos_token_id": 4, "forced_eos_token_id": EOS},
    "all": {
        "no_repeat_ngram_size": 2, "min_new_tokens": 8, "suppress_tokens": [PAD, 9],
        "forced_bos_token_id": 4, "forced_eos_token_id": EOS,
    },
}  # fmt: skip
BEAMS = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 3},
    "all-of-four": {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True},
    "no-cache": {"num_beams": 2, "use_cache": False},
    "static-cache": {"num_beams": 2, "cache_implementation": "static"},
}


def generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Any:
    # a pad token that is written means something else to T5Gemma's mask, ranked or not
    defaults = {"max_new_tokens": STEPS, "suppress_tokens": [PAD]}
    return model.generate(**inputs, **{**defaults, **settings})


def new_tokens(model: Any, inputs: dict[str, Tensor], tokens: Tensor) -> int:
    begun = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return tokens.shape[1] - begun


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all rankings; a CPU ranks here as a GPU would."""
    found: list[int] = []
    rank = ops.linear_topk

    def noted(h: Tensor, weight: Tensor, k: int, **options: Any) -> Any:
        found.append(k)
        return rank(h, weight, k, **options)

    monkeypatch.setattr(ops, "linear_topk", noted)
    monkeypatch.setattr(generation, "_slower", lambda *_: None)
    return found


def both(model: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> tuple[Any, Any]:
    expected = generate(model, inputs, **settings)
    with fastvlm.patched(model):
        return expected, generate(model, inputs, **settings)


@pytest.mark.turns(3)
@pytest.mark.parametrize("beams", BEAMS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_tokens(settings: str, beams: str, family: Family, ranked: list[int]) -> None:
    if beams == "static-cache" and family is FAMILIES["paligemma2"]:
        pytest.skip("transformers' own generate() of PaliGemma fails with a static cache")
    model = family.build()
    options = {**SETTINGS[settings], **BEAMS[beams]}
    inputs = family.inputs(model)
    expected, got = both(model, inputs, **options)
    assert torch.equal(expected, got)
    forced = sum(name.startswith("forced") for name in options)  # these need no ranking
    assert len(ranked) + forced >= new_tokens(model, inputs, got) > 0


class Columns(TorchDispatchMode):
    """The operators that make a tensor as wide as the vocabulary, its weights and bias left out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.found = width, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            # a row of whole numbers may be the program of a step, whose length is what it is
            if not isinstance(t, Tensor) or t.dim() < 1 + (t.dtype == torch.int64):
                continue
            if t.shape[-1] % self.width == 0 < t.numel():
                self.found.add(str(func))
        return out


@pytest.mark.parametrize("beams", [1, 3])
def test_no_tensor_of_the_vocabulary(beams: int, family: Family, ranked: list[int]) -> None:
    model = family.build()
    inputs = family.inputs(model)
    options = {**SETTINGS["all"], "num_beams": beams}
    with Columns(VOCAB) as seen:
        generate(model, inputs, **options)
    assert seen.found  # the mode sees logits
    fastvlm.patch(model)
    with Columns(VOCAB) as seen:
        generate(model, inputs, **options)
    # BART's bias comes as a row of its own
    assert seen.found <= {"aten.view.default", "aten._to_copy.default", "aten.alias.default"}
    assert ranked


@pytest.mark.parametrize("settings", SETTINGS)
def test_scores_of_beams(settings: str, ranked: list[int]) -> None:
    """As transformers gives them beside all scores, for a caller that looks at no others."""
    model = bart()
    inputs = FAMILIES["bart"].inputs(model)
    options = {**SETTINGS[settings], "num_beams": 3, "num_return_sequences": 3}
    ask = {"return_dict_in_generate": True, "output_scores": True}
    expected = generate(model, inputs, **options, **ask)
    fastvlm.patch(model)
    noted = TokenScores(beams=True)
    got = generate(model, inputs, **options, **ask, stopping_criteria=[noted])
    assert ranked
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.allclose(got.sequences_scores, expected.sequences_scores, atol=1e-5)


class Meddling(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert type(scores) is Tensor
        scores[:, ::2] -= 3.0
        return scores


class Stopping(StoppingCriteria):
    """Calls the model itself, as a model that rates what it wrote."""

    def __init__(self, model: Any, inputs: dict[str, Tensor]) -> None:
        self.call = lambda ids: model(**inputs, decoder_input_ids=ids)
        self.kinds: set[type] = set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.kinds.add(type(self.call(input_ids[:3]).logits))
        return torch.full((input_ids.shape[0],), input_ids.shape[1] > 7)


def _hook(model: Any) -> Any:
    return model.lm_head.register_forward_hook(lambda module, args, out: out * 2)


# what must see all scores: settings, and what is done to the model before
FALLBACKS: dict[str, tuple[dict[str, Any], Any]] = {
    "scores": ({"return_dict_in_generate": True, "output_scores": True}, None),
    "logits": ({"return_dict_in_generate": True, "output_logits": True}, None),
    "own-processor": ({"logits_processor": [Meddling()]}, None),
    "repetition-penalty": ({"repetition_penalty": 1.3}, None),
    "bad-words": ({"bad_words_ids": [[5], [6, 7]]}, None),
    "renormalize": ({"renormalize_logits": True, "suppress_tokens": [5]}, None),
    "sample": ({"do_sample": True}, None),
    "hook": ({}, _hook),
    "float64": ({}, lambda model: model.double()),
    "adapter": ({}, lambda model: setattr(model.lm_head, "forward", Adapted(model.lm_head))),
}


class Adapted:
    def __init__(self, head: nn.Linear) -> None:
        self.head = head

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.head.weight) + x.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", FALLBACKS)
@pytest.mark.parametrize("beams", [1, 3])
def test_all_scores_where_they_are_needed(name: str, beams: int, ranked: list[int]) -> None:
    settings, prepare = FALLBACKS[name]
    model = bart()
    inputs = FAMILIES["bart"].inputs(model)
    if prepare is not None:
        prepare(model)
    found = []
    for patch in (False, True):
        with fastvlm.patched(model) if patch else _nothing():
            torch.manual_seed(3)
            out = generate(model, inputs, num_beams=beams, **settings)
        found.append(out if isinstance(out, Tensor) else out.sequences)
    assert torch.equal(*found)
    assert not ranked


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_weights_in_fewer_bits_stay_with_logits(weights: str, ranked: list[int]) -> None:
    model = florence2()
    inputs = FAMILIES["florence2"].inputs(model)
    fastvlm.patch(model, weights=weights)
    generate(model, inputs, num_beams=3)
    assert not ranked


def test_more_bans_than_a_ranking_is_long(ranked: list[int]) -> None:
    model = gemma2()
    inputs = FAMILIES["gemma2"].inputs(model)
    many = list(range(10, 80))
    expected, got = both(model, inputs, num_beams=3, suppress_tokens=many)
    assert torch.equal(expected, got)
    assert not ranked
    expected, got = both(model, inputs, num_beams=20, suppress_tokens=many[:40])
    assert torch.equal(expected, got)
    assert not ranked


def test_a_forward_of_the_users_gives_tensors(ranked: list[int]) -> None:
    """Beside a loop, within one, and in a hook on the model, which changes what the loop sees."""
    model = bart()
    inputs = FAMILIES["bart"].inputs(model)
    fastvlm.patch(model)
    assert type(model(**inputs).logits) is Tensor
    criterion = Stopping(model, inputs)
    expected = generate(model, inputs, num_beams=3, max_new_tokens=7)
    criterion.call(expected[:3])
    got = generate(model, inputs, num_beams=3, stopping_criteria=[criterion])
    assert criterion.kinds == {Tensor}
    assert ranked
    assert torch.equal(got[:, :7], expected[:, :7])
    ranked.clear()

    def shifted(module: Any, args: Any, out: Any) -> None:
        out.logits[..., 11] += 100.0

    with model.register_forward_hook(shifted):
        got = generate(model, inputs, num_beams=3)
    assert (got[:, 1:] == 11).all()
    assert not ranked


def test_a_model_that_writes_into_its_logits(ranked: list[int]) -> None:
    class Own(type(bart())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits[:, :, 7:20] = float("-inf")
            out.logits.mul_(0.5)
            return out

    model = bart()
    model.__class__ = Own
    inputs = FAMILIES["bart"].inputs(model)
    expected, got = both(model, inputs, num_beams=3)
    assert torch.equal(expected, got)


def test_a_loop_of_the_users_own(ranked: list[int]) -> None:
    class Own(type(bart())):  # type: ignore[misc]
        def _sample(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            logits = self(input_ids=input_ids, decoder_input_ids=input_ids).logits
            assert type(logits) is Tensor
            return input_ids

    model = bart()
    model.__class__ = Own
    fastvlm.patch(model)
    generate(model, FAMILIES["bart"].inputs(model))
    assert not ranked


def test_after_an_error(ranked: list[int]) -> None:
    class Failing(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            raise ZeroDivisionError

    model = bart()
    inputs = FAMILIES["bart"].inputs(model)
    expected = generate(model, inputs, num_beams=3)
    fastvlm.patch(model)
    with pytest.raises(ZeroDivisionError):
        generate(model, inputs, num_beams=3, stopping_criteria=[Failing()])
    assert type(model(**inputs).logits) is Tensor
    assert torch.equal(generate(model, inputs, num_beams=3), expected)
    fastvlm.unpatch(model)
    assert torch.equal(generate(model, inputs, num_beams=3), expected)


def test_pickled_and_in_two_threads(ranked: list[int]) -> None:
    model = florence2()
    inputs = FAMILIES["florence2"].inputs(model)
    options = [{"num_beams": 3, **SETTINGS["all"]}, {"num_beams": 3, "repetition_penalty": 1.5}]
    expected = [generate(model, inputs, **o) for o in options]
    fastvlm.patch(model)
    model = pickle.loads(pickle.dumps(model))
    found: list[list[Tensor]] = [[], []]

    def run(place: int) -> None:
        for _ in range(3):
            found[place].append(generate(model, inputs, **options[place]))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [len(each) for each in found] == [3, 3]
    for tokens, wanted in zip(found, expected):
        assert all(torch.equal(each, wanted) for each in tokens)


def test_a_compiled_forward_has_logits(ranked: list[int]) -> None:
    model = bart()
    inputs = FAMILIES["bart"].inputs(model)
    expected = generate(model, inputs, num_beams=2, max_new_tokens=3)
    fastvlm.patch(model)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(generate(model, inputs, num_beams=2, max_new_tokens=3), expected)


def test_streamers_and_the_reference(ranked: list[int]) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.tokens.append(value.flatten())

        def end(self) -> None:
            self.tokens.append(torch.tensor([-1]))

    model = bart()
    inputs = {name: value[:1] for name, value in FAMILIES["bart"].inputs(model).items()}
    told = []
    for patch in (False, True):
        streamer = Streamer()
        with fastvlm.patched(model) if patch else _nothing(), fastvlm.use("reference"):
            generate(model, inputs, streamer=streamer)
        told.append(torch.cat(streamer.tokens))
    assert torch.equal(*told)
    assert not ranked  # a streamer is transformers' own loop's


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype, ranked: list[int]) -> None:
    """A ranking does not round the logits to 16 bits: it finds the best of more exact ones."""
    model = bart().to(dtype)
    inputs = FAMILIES["bart"].inputs(model)
    fastvlm.patch(model)
    got = generate(model, inputs, max_new_tokens=1, min_new_tokens=1)
    start = got[:, :1]
    with torch.no_grad():
        states = model.model(**inputs, decoder_input_ids=start).last_hidden_state[:, -1]
    exact = states.double() @ model.lm_head.weight.double().T + model.final_logits_bias.double()
    assert ranked
    assert torch.equal(got[:, 1], exact.argmax(1))


def test_a_hook_around_the_head(ranked: list[int]) -> None:
    model = t5gemma()
    inputs = FAMILIES["t5gemma"].inputs(model)
    model.lm_head.register_forward_hook(lambda module, args, out: out.flip(-1))
    expected, got = both(model, inputs, num_beams=3)
    assert torch.equal(expected, got)
    assert not ranked


# rows, loop, dtype of the weight, and whether a CPU ranks
ON_A_CPU = [
    (3, "_beam_search", torch.float32, True),
    (500, "_beam_search", torch.float32, True),
    (3, "_sample", torch.float32, False),
    (64, "_beam_search", torch.bfloat16, True),
    (65, "_beam_search", torch.bfloat16, False),
]


@pytest.mark.parametrize(("rows", "loop", "dtype", "wanted"), ON_A_CPU)
def test_a_cpu_ranks_where_that_is_faster(
    rows: int, loop: str, dtype: torch.dtype, wanted: bool
) -> None:
    weight = torch.empty(VOCAB, 8, dtype=dtype)
    assert (generation._slower(weight, rows, loop) is None) == wanted
    assert generation._slower(weight.to("meta"), rows, loop) is None


def test_the_shared_steps_of_a_loop_are_its_own(ranked: list[int]) -> None:
    """Loops of other numbers of beams, one after the other and one within the other."""
    model, other = bart(), florence2()
    inputs = FAMILIES["bart"].inputs(model)
    expected = [generate(model, inputs, num_beams=beams) for beams in (2, 4, 3)]
    theirs = FAMILIES["florence2"].inputs(other)
    wanted = generate(other, theirs, num_beams=2, suppress_tokens=[PAD, 5])
    fastvlm.patch(model)
    fastvlm.patch(other)

    class Within(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            assert torch.equal(
                generate(other, theirs, num_beams=2, suppress_tokens=[PAD, 5]), wanted
            )
            sampled = generate(model, inputs, num_beams=4, repetition_penalty=1.2)
            assert sampled.shape[0] == 3
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    for beams, tokens in zip((2, 4, 3), expected):
        got = generate(model, inputs, num_beams=beams, stopping_criteria=[Within()])
        assert torch.equal(got, tokens)
