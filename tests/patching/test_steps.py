"""Decoding steps: planned where nothing but the usual is there, else by the modules."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import transformers as tf
from models import FAMILIES
from test_families import generate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastvlm
from fastvlm.decoding import rows
from fastvlm.decoding.prefixes import decoder_stack
from fastvlm.patching.decoder_stack import DecoderStack
from fastvlm.run.step import DecodeStep

PLANNED = ["bart", "florence2", "gemma2", "florenz", "t5gemma", "whisper"]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each planned step had."""
    calls: list[int] = []
    run = DecodeStep.__call__

    def counted(self: DecodeStep, *args: Any) -> Any:
        calls.append(len(self.layers))
        return run(self, *args)

    monkeypatch.setattr(DecodeStep, "__call__", counted)
    return calls


def patched(name: str, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = FAMILIES[name].build()
    fastvlm.patch(model, **settings)
    return model, FAMILIES[name].inputs(model)


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
def test_every_step_but_the_prefill_is_planned(
    name: str, weights: str | None, planned: list[int]
) -> None:
    model, inputs = patched(name, weights=weights)
    generate(model, inputs, num_beams=3)
    assert planned == [2] * 11  # of twelve new tokens the prefill gives the first


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("weights", [None, "int8"])
def test_planned_and_called_steps_are_the_same(
    name: str, weights: str | None, planned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = patched(name, weights=weights)
    wish = {"num_beams": 3, "output_scores": True, "return_dict_in_generate": True}
    ours = generate(model, inputs, **wish)
    count = len(planned)
    monkeypatch.setattr(DecoderStack, "_compiled", lambda *_: None)
    called = generate(model, inputs, **wish)
    assert len(planned) == count > 0
    assert torch.equal(ours.sequences, called.sequences)
    for a, b in zip(ours.scores, called.scores):
        assert torch.allclose(a, b, atol=1e-4)


class Settings(TorchDispatchMode):
    """The numbers that each attention op is given: window, scale, softcap and the like."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("fastvlm::cross_attention", "fastvlm::cached_attention"):
            self.seen.add((name, *args[-5 if "cross" in name else -3 :]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PLANNED)
def test_planned_and_called_steps_ask_for_the_same(
    name: str, planned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is the same number on one backend may keep another from serving."""
    model, inputs = patched(name)
    with Settings() as ours:
        generate(model, inputs, num_beams=2)
    count = len(planned)
    monkeypatch.setattr(DecoderStack, "_compiled", lambda *_: None)
    with Settings() as called:
        generate(model, inputs, num_beams=2)
    assert len(planned) == count > 0
    assert ours.seen == called.seen


class Called(TorchDispatchMode):
    """How often each op of a name is called."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word, self.calls = word, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.word in func._schema.name:
            self.calls[func._schema.name.removeprefix("fastvlm::")] += 1
        return func(*args, **(kwargs or {}))


def steps_counted(word: str, monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """From here on a counter of the ops of this name for each planned step."""
    seen: list[Counter[str]] = []
    run = DecodeStep.__call__

    def counted(self: DecodeStep, *args: Any) -> Any:
        with Called(word) as called:
            result = run(self, *args)
        seen.append(called.calls)
        return result

    monkeypatch.setattr(DecodeStep, "__call__", counted)
    return seen


@pytest.mark.parametrize("name", PLANNED)
def test_int8_products_take_their_activation_along(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One op for the first half of each layer's MLP, called op by op as on a GPU."""
    seen = steps_counted("low_precision_hidden", monkeypatch)
    model, inputs = patched(name, weights="int8")
    generate(model, inputs, num_beams=2)
    layers = len(decoder_stack(model).layers)
    assert seen == [Counter(low_precision_hidden=layers)] * 11


@pytest.mark.parametrize(("name", "tails"), [("gemma2", 2), ("florenz", 3), ("t5gemma", 3)])
def test_a_norm_is_also_the_one_after_it(
    name: str, tails: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's last norm gives what the next layer reads, the last layer's the stack's states."""
    seen = steps_counted("norm", monkeypatch)
    generate(*patched(name), num_beams=2)
    assert seen == [{"rms_norm": 1, "residual_rms_norm": 2 * tails}] * 11


@pytest.mark.parametrize("name", PLANNED)
def test_adapters_and_hooks_are_called(name: str, planned: list[int]) -> None:
    model, inputs = patched(name)
    expected = generate(model, inputs, num_beams=2)
    linear = next(m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    seen: list[int] = []
    stack = [m for n, m in model.named_modules() if n.endswith("decoder.layers.1.self_attn.q_proj")]
    linear = stack[0] if stack else linear
    linear.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    planned.clear()
    assert torch.equal(generate(model, inputs, num_beams=2), expected)
    assert len(seen) == 12
    assert planned == []


@pytest.mark.parametrize("name", ["gemma2", "florenz", "t5gemma"])
def test_an_mlp_that_is_not_patched_is_called(name: str, planned: list[int]) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    expected = generate(model, inputs, num_beams=2)
    fastvlm.patch(model, only=("attention", "norm"))
    assert torch.equal(generate(model, inputs, num_beams=2), expected)
    assert planned == []


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@pytest.mark.parametrize("name", PLANNED)
def test_hooks_of_all_modules_are_called(name: str, kind: str, planned: list[int]) -> None:
    """Of the decoder's layers and of what has parameters in them, in every step."""
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    inner = decoder_stack(model).layers.named_modules()
    names = {module: at for at, module in inner if list(module.parameters())}
    seen: Counter[str] = Counter()

    def note(module: nn.Module, *_: Any) -> None:
        if module in names:
            seen[names[module]] += 1

    found = []
    for patch in (fastvlm.unpatch, fastvlm.patch):
        patch(model)
        seen.clear()
        handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(note)
        try:
            found.append((generate(model, inputs, num_beams=2).tolist(), dict(seen)))
        finally:
            handle.remove()
    assert found[0] == found[1]
    assert found[0][1]["1.self_attn.q_proj"] == 12
    assert planned == []


def test_weights_that_change_between_calls_are_seen(planned: list[int]) -> None:
    model, inputs = patched("bart")
    before = generate(model, inputs)
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight.mul_(-1)
    after = generate(model, inputs)
    assert planned
    assert not torch.equal(before, after)
    fastvlm.unpatch(model)
    assert torch.equal(generate(model, inputs), after)


class Negate(tf.LogitsProcessor):
    """At its fourth step a weight of the first layer is written to, or another takes its place."""

    def __init__(self, linear: nn.Linear, replaces: bool) -> None:
        self.steps, self.linear, self.replaces = 0, linear, replaces

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        if self.steps == 4 and self.replaces:
            self.linear.weight = nn.Parameter(-self.linear.weight.detach())
        elif self.steps == 4:
            self.linear.weight.data.neg_()
        return scores


def test_weights_that_change_in_the_middle() -> None:
    """Written to: seen at once. Replaced: by the next call, as the README says."""
    found: dict[tuple[bool, bool], torch.Tensor] = {}
    for replaces in (False, True):
        for ours in (False, True):
            model = FAMILIES["bart"].build()
            inputs = FAMILIES["bart"].inputs(model)
            if ours:
                fastvlm.patch(model)
            before = generate(model, inputs)
            change = Negate(model.model.decoder.layers[0].fc1, replaces)
            found[replaces, ours] = generate(model, inputs, logits_processor=[change])
            after = generate(model, inputs)
            assert not torch.equal(after, before)
    assert torch.equal(found[False, True], found[False, False])
    assert torch.equal(found[True, True], before)


@pytest.mark.parametrize("name", ["bart", "florenz", "t5gemma", "gemma2"])
def test_keys_and_values_are_written_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams change places in a table; the cache is what transformers' reordered one is."""
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    if name == "gemma2":  # what stands at its padding is nobody's business
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    wish = {"num_beams": 4, "return_dict_in_generate": True}
    plain = generate(model, inputs, **wish).past_key_values
    fastvlm.patch(model)
    moved: list[torch.Tensor] = []
    reorder = rows.Rows.reorder

    def watched(self: Any, index: torch.Tensor, *others: Any) -> None:
        moved.append(index)
        reorder(self, index, *others)

    monkeypatch.setattr(rows.Rows, "reorder", watched)
    ours = generate(model, inputs, **wish).past_key_values
    plain, ours = (getattr(c, "self_attention_cache", c) for c in (plain, ours))
    # where all beams stay in place nothing is moved
    assert any((index != torch.arange(len(index))).any() for index in moved)
    for a, b in zip(ours.layers, plain.layers):
        length = b.keys.shape[2]  # a sliding window of transformers' drops what is behind it
        assert torch.allclose(a.keys[:, :, -length:], b.keys, atol=1e-5)
        assert torch.allclose(a.values[:, :, -length:], b.values, atol=1e-5)


class TestCache:
    """What users and transformers do with a cache."""

    def filled(self, steps: int = 3) -> tuple[nn.Module, Any, dict[str, Any]]:
        model, _ = patched("bart")
        cache = model.model.decoder.new_cache()
        # both rows read one image: what moves from row to row then belongs to it
        given = {"encoder_outputs": (torch.randn(1, 4, 32),), "past_key_values": cache}
        with torch.no_grad():
            model(**given, decoder_input_ids=torch.tensor([[2, 5], [2, 6]]))
            for step in range(steps):
                model(**given, decoder_input_ids=torch.tensor([[7 + step], [9 + step]]))
        return model, cache, given

    def logits(self, model: nn.Module, given: dict[str, Any], ids: list[list[int]]) -> Any:
        with torch.no_grad():
            return model(**given, decoder_input_ids=torch.tensor(ids)).logits

    def whole(self, model: nn.Module, given: dict[str, Any], ids: list[list[int]]) -> Any:
        with torch.no_grad():
            out = model(
                encoder_outputs=given["encoder_outputs"],
                decoder_input_ids=torch.tensor(ids),
                use_cache=False,
            )
        return out.logits[:, -1:]

    def test_reorder_then_select_then_go_on(self) -> None:
        model, cache, given = self.filled()
        cache.reorder_cache(torch.tensor([1, 0]))
        got = self.logits(model, given, [[11], [12]])
        history = [[2, 6, 9, 10, 11, 11], [2, 5, 7, 8, 9, 12]]
        assert torch.allclose(got, self.whole(model, given, history), atol=1e-4)
        own = cache.self_attention_cache
        own.batch_select_indices(torch.tensor([1, 0]))
        got = self.logits(model, given, [[13], [14]])
        history = [history[1] + [13], history[0] + [14]]
        assert torch.allclose(got, self.whole(model, given, history), atol=1e-4)

    def test_crop_after_a_reorder(self) -> None:
        model, cache, given = self.filled()
        cache.reorder_cache(torch.tensor([1, 1]))
        with pytest.raises(ValueError, match=r"must be 0 or less, .* got 2"):
            cache.self_attention_cache.layers[0].crop(2)
        cache.self_attention_cache.crop(-2)
        got = self.logits(model, given, [[20], [21]])
        history = [[2, 6, 9, 20], [2, 6, 9, 21]]
        assert torch.allclose(got, self.whole(model, given, history), atol=1e-4)

    def test_several_tokens_after_a_reorder(self) -> None:
        model, cache, given = self.filled()
        cache.reorder_cache(torch.tensor([1, 0]))
        got = self.logits(model, given, [[20, 22], [21, 23]])[:, -1:]
        history = [[2, 6, 9, 10, 11, 20, 22], [2, 5, 7, 8, 9, 21, 23]]
        assert torch.allclose(got, self.whole(model, given, history), atol=1e-4)
        got = self.logits(model, given, [[24], [25]])
        history = [history[0] + [24], history[1] + [25]]
        assert torch.allclose(got, self.whole(model, given, history), atol=1e-4)

    def test_more_positions_than_there_was_room_for(self) -> None:
        model, cache, given = self.filled(steps=rows.ROOM + 9)
        length = rows.ROOM + 11
        assert cache.get_seq_length() == length
        assert cache.self_attention_cache.layers[0].k.shape[1] >= length
        history = [[2, 5, *range(7, 16 + rows.ROOM)], [2, 6, *range(9, 18 + rows.ROOM)]]
        got = self.logits(model, given, [[3], [4]])
        history = [history[0] + [3], history[1] + [4]]
        assert torch.allclose(got, self.whole(model, given, history), atol=1e-4)

    def test_a_cache_of_inference_mode_goes_on_without(self) -> None:
        model, _ = patched("bart")
        given = {"encoder_outputs": (torch.randn(1, 4, 32),)}
        with torch.inference_mode():
            cache = model.model.decoder.new_cache()
            model(**given, past_key_values=cache, decoder_input_ids=torch.tensor([[2], [2]]))
            cache.reorder_cache(torch.tensor([1, 0]))
        given["past_key_values"] = cache
        got = self.logits(model, given, [[7], [8]])
        cache.reorder_cache(torch.tensor([1, 0]))
        assert torch.allclose(got, self.whole(model, given, [[2, 7], [2, 8]]), atol=1e-4)

    @pytest.mark.usefixtures("young_collector")
    def test_nothing_holds_a_cache(self) -> None:
        _model, cache, given = self.filled()
        gc.collect()
        gc.disable()
        try:
            layer = weakref.ref(cache.self_attention_cache.layers[0])
            del cache, given
            assert layer() is None
        finally:
            gc.enable()

    def test_assigned_keys(self) -> None:
        model, cache, given = self.filled()
        layers = cache.self_attention_cache.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
        got = self.logits(model, given, [[20], [21]])
        history = [[2, 5, 7, 8, 20], [2, 6, 9, 10, 21]]
        assert torch.allclose(got, self.whole(model, given, history), atol=1e-4)
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(NotImplementedError, match="have changed places"):
            layers[0].keys = layers[0].keys

    def test_a_hook_between_two_turns_is_called(self, planned: list[int]) -> None:
        """Several tokens at once begin a turn; the steps behind them are planned anew."""
        model, _cache, given = self.filled()
        assert planned == [2, 2, 2]
        calls: list[int] = []
        linear = model.model.decoder.layers[0].self_attn.q_proj
        linear.register_forward_hook(lambda m, args, out: calls.append(out.shape[1]))
        self.logits(model, given, [[20, 22], [21, 23]])
        self.logits(model, given, [[24], [25]])
        assert calls == [2, 1]
        assert len(planned) == 3

    def test_copies_are_apart(self) -> None:
        model, cache, given = self.filled()
        buffer = io.BytesIO()
        torch.save(cache, buffer)  # without the model
        assert buffer.tell() < 200_000
        other = {**given, "past_key_values": copy.deepcopy(cache)}
        first = self.logits(model, given, [[30], [31]])
        other["past_key_values"].reorder_cache(torch.tensor([1, 0]))
        assert torch.allclose(self.logits(model, other, [[31], [30]]), first.flip(0), atol=1e-4)
