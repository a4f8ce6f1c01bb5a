"""What somebody put in the place of a function or method of transformers, or said of an attention,
counts in a patched model as in one that is not."""

from __future__ import annotations

import functools
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bert_models import BERTS
from gemma3_models import GEMMA3
from llama_models import LLAMAS
from models import FAMILIES, RELATIVES
from sameness import assert_the_same, numbers
from test_families import generate

import fastvlm

ALL = {**FAMILIES, **RELATIVES, **LLAMAS, **GEMMA3, **BERTS}
CASES = [{}, {"num_beams": 3}]


def given(name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    model = ALL[name].build()
    return model, ALL[name].training(model), ALL[name].inputs(model)


def results(model: Any, batch: dict[str, Any], inputs: dict[str, Any]) -> tuple[Any, list[Any]]:
    return numbers(model, batch), [generate(model.eval(), inputs, **case) for case in CASES]


def assert_alike(got: tuple[Any, list[Any]], want: tuple[Any, list[Any]]) -> None:
    assert_the_same(got[0], want[0])
    assert all(map(torch.equal, got[1], want[1]))


def changes(name: str, change: Callable[[Any], Any], before: bool = False) -> None:
    """The same numbers and tokens, others than before the change, and a word about it."""
    plain, batch, inputs = given(name)
    usual = numbers(plain, batch)[0]
    change(plain)
    want = results(plain, batch, inputs)
    assert not torch.allclose(want[0][0], usual, rtol=1e-4)
    assert_noticed(name, change, before, batch, inputs, want)


def assert_noticed(
    name: str, change: Callable[[Any], Any], before: bool, batch: Any, inputs: Any, want: Any
) -> None:
    ours = given(name)[0]
    if before:
        change(ours)
    report = fastvlm.patch(ours)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if not before:
            change(ours)
        assert_alike(results(ours, batch, inputs), want)
    if before:
        assert report.skipped
    else:
        assert any("as transformers computes it" in str(each.message) for each in told)


@pytest.fixture(autouse=True)
def told_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm.patching.interposed._told", set())


def files_of(model: Any, function: str) -> list[Any]:
    homes = {cls.__module__ for m in model.modules() for cls in type(m).__mro__}
    files = [sys.modules[home] for home in homes if home.startswith("transformers.models.")]
    return [file for file in files if hasattr(file, function)]


@pytest.fixture
def put() -> Iterator[Any]:
    """put(model, function, make): make(function) stands in its place in the files of a model."""
    kept: list[tuple[Any, str, Any]] = []

    def replace(model: Any, function: str, make: Any) -> None:
        for file in files_of(model, function):
            kept.append((file, function, getattr(file, function)))
            setattr(file, function, make(getattr(file, function)))

    yield replace
    for each in reversed(kept):
        setattr(*each)


def halved(attention: Any) -> Any:
    @functools.wraps(attention)  # which gives it the name of transformers' file
    def mine(*args: Any, **kwargs: Any) -> Any:
        out = attention(*args, **kwargs)
        return (out[0] * 0.5, *out[1:])

    return mine


def turned_less(rotation: Any) -> Any:
    return lambda q, k, cos, sin, *args, **kwargs: rotation(q, k, cos * 0.5, sin, *args, **kwargs)


def narrow(masks: Any) -> Any:
    def mine(*args: Any, **kwargs: Any) -> Any:
        return masks(*args, **kwargs, and_mask_function=lambda b, h, q, kv: q - kv < 3)

    return mine


FUNCTIONS = {"eager_attention_forward": halved, "apply_rotary_pos_emb": turned_less}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("name", "function"),
    [
        *((name, "eager_attention_forward") for name in ("bart", "t5", "gpt2", "bert", "whisper")),
        *((name, "apply_rotary_pos_emb") for name in ("gemma2", "t5gemma", "gemma3", "mllama")),
    ],
)
def test_a_function_in_the_file_of_a_class(
    name: str, function: str, before: bool, put: Any
) -> None:
    plain, batch, inputs = given(name)
    plain.set_attn_implementation("eager")
    usual = numbers(plain, batch)[0]
    ours = given(name)[0]
    ours.set_attn_implementation("eager")
    if not before:
        fastvlm.patch(ours)
    put(plain, function, FUNCTIONS[function])
    want = results(plain, batch, inputs)
    assert not torch.allclose(want[0][0], usual, rtol=1e-4)
    if before:
        assert any("was replaced by" in str(e.reason) for e in fastvlm.patch(ours).skipped)
        assert_alike(results(ours, batch, inputs), want)
        return
    with pytest.warns(UserWarning, match="was replaced by"):
        assert_alike(results(ours, batch, inputs), want)


def test_a_function_that_makes_masks(put: Any) -> None:
    plain, batch, inputs = given("gemma2")
    ours = given("gemma2")[0]
    fastvlm.patch(ours)
    put(plain, "create_causal_mask", narrow)
    with pytest.warns(UserWarning, match="create_causal_mask of Gemma2Model was replaced"):
        assert_alike(results(ours, batch, inputs), results(plain, batch, inputs))


def another_token(prepare: Any) -> Any:
    @functools.wraps(prepare)
    def mine(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = prepare(*args, **kwargs)
        for key in ("input_ids", "decoder_input_ids"):
            if found.get(key) is not None and found[key].shape[1] == 1:
                found[key] = (found[key] + 1).clamp_max(90)
        return found

    mine.__module__ = __name__
    return mine


@pytest.mark.parametrize("where", ["instance", "class"])
@pytest.mark.parametrize("name", ["bart", "t5", "t5gemma", "gemma2", "gpt2"])
def test_a_method_that_is_called_between_two_steps(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = "prepare_inputs_for_generation"
    plain, _, inputs = given(name)
    ours = given(name)[0]
    usual = [generate(plain, inputs, **case) for case in CASES]
    fastvlm.patch(ours)
    if where == "class":
        own = getattr(type(plain), method)

        def mine(self: Any, *args: Any, **kwargs: Any) -> Any:
            return another_token(own.__get__(self))(self, *args, **kwargs)

        mine.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
        monkeypatch.setattr(type(plain), method, mine)
    else:
        for model in (plain, ours):
            own = getattr(model, method)
            monkeypatch.setattr(model, method, types.MethodType(another_token(own), model), False)
    want = [generate(plain, inputs, **case) for case in CASES]
    assert not all(map(torch.equal, want, usual))
    assert all(map(torch.equal, [generate(ours, inputs, **case) for case in CASES], want))


def configs(model: Any) -> list[Any]:
    return [m.config for m in model.modules() if hasattr(m, "config")]


def sees_all(model: Any) -> None:
    for path, module in model.get_decoder().named_modules():
        if hasattr(module, "is_causal") and "encoder_attn" not in path and "ross" not in path:
            module.is_causal = False


def narrower(model: Any) -> None:
    for config in configs(model):
        if getattr(config, "sliding_window", None):
            config.sliding_window = 2


def full(model: Any) -> None:
    for config in configs(model):
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"] * len(config.layer_types)


def swapped(model: Any) -> None:
    layers = model.get_decoder().layers
    layers[0], layers[1] = layers[1], layers[0]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index


WINDOWS = ("gemma2", "t5gemma", "gemma3", "t5gemma2-text")


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name in WINDOWS for change in (narrower, full, swapped)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_windows_are_those_of_the_configuration(
    name: str, change: Callable[[Any], Any], before: bool
) -> None:
    changes(name, change, before)


@pytest.mark.parametrize("name", ["bart", "whisper", "t5", "gpt2", "bert", "gemma2", "mllama"])
def test_an_attention_that_says_it_sees_all(name: str) -> None:
    """Transformers' sdpa listens to it where there is no mask; where there is one, to that."""
    plain, batch, inputs = given(name)
    sees_all(plain)
    assert_noticed(name, sees_all, False, batch, inputs, results(plain, batch, inputs))
