"""Mllama: layers that read pictures between layers of text. What is its own; the rest is in
test_families.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from llama_models import LLAMAS, _with_pictures, mllama, open_gates
from models import RELATIVES, VOCAB, _causal_inputs
from sameness import assert_adapted_is_the_same, assert_the_same, assert_writes_the_same, numbers
from test_families import generate
from torch import Tensor, nn

import fastvlm

OPS = {
    *("self_attention", "cross_attention", "cached_attention", "rope", "rms_norm", "geglu_mlp"),
    *("linear_cross_entropy", "linear_topk"),
}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False, "num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4},
    "static": {"cache_implementation": "static", "num_beams": 2, "disable_compile": True},
}
if "_prepare_static_cache" not in vars(tf.MllamaForConditionalGeneration):
    del CASES["static"]  # to 5.17, where pictures do not fit into it
# pictures of so many tiles for each text
PICTURES = {
    "of all tiles": [[4], [4], [4]],
    "of some": [[1], [3], [2]],
    "two": [[1, 3], [2], [4, 1]],
    "none in one": [[2], [], [1, 1]],
}


def inputs_of(tiles: list[list[int]]) -> dict[str, Tensor]:
    return _with_pictures(_causal_inputs(nn.Module()), tiles)


def batch_of() -> dict[str, Tensor]:
    return LLAMAS["mllama"].training(nn.Module())


def test_all_of_it_is_patched_and_nothing_else_changes() -> None:
    model: Any = mllama()
    before = {n: (id(p), p.data_ptr(), p.shape) for n, p in model.named_parameters()}
    kinds = {type(m) for m in model.modules()}
    report = fastvlm.patch(model)
    assert {op for entry in report.patched for op in entry.ops} >= OPS
    assert [e.module for e in report.skipped] == ["model.multi_modal_projector"]
    generate(model, inputs_of([[1, 3], [2], [4]]), num_beams=2)
    numbers(model, batch_of())
    assert {n: (id(p), p.data_ptr(), p.shape) for n, p in model.named_parameters()} == before
    fastvlm.unpatch(model)
    assert {type(m) for m in model.modules()} == kinds


def test_the_same_tokens_by_a_step_that_is_written_down(steps: list[Any]) -> None:
    assert_writes_the_same(mllama(), inputs_of(PICTURES["two"]), CASES, steps, strict=False)


@pytest.mark.parametrize("pictures", PICTURES)
def test_pictures(pictures: str, steps: list[Any]) -> None:
    model, inputs = mllama(), inputs_of(PICTURES[pictures])
    expected = [generate(model, inputs, num_beams=n) for n in (1, 3)]
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == VOCAB - 1, -100)
    want = numbers(copy.deepcopy(model), {**inputs, "labels": labels})
    fastvlm.patch(model)
    for n, tokens in zip((1, 3), expected):
        assert torch.equal(generate(model, inputs, num_beams=n), tokens)
    assert_the_same(numbers(model, {**inputs, "labels": labels}), want)
    # a text without a picture: its rows are left out of an MLP, which no program knows
    assert bool(steps) == ("none" not in pictures)
    assert None not in steps
    with fastvlm.use("reference"):  # the same program, op by op
        assert torch.equal(generate(model.eval(), inputs, num_beams=3), expected[1])


def test_training_with_checkpoints() -> None:
    """The reentrant kind with text alone: patched or not, what made the pictures cannot be gone
    through once for each layer that reads them."""
    for batch, reentrant in ((batch_of(), False), (RELATIVES["gpt2"].training(nn.Module()), True)):
        model: Any = mllama()
        want = numbers(model, batch)
        fastvlm.patch(model)
        assert_the_same(numbers(model, batch), want)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_the_same(numbers(model, batch), want)


def test_text_alone(steps: list[Any]) -> None:
    model = mllama()
    inputs = _causal_inputs(model)
    expected = generate(model, inputs, num_beams=3)
    batch = {**inputs, "labels": inputs["input_ids"]}
    want = numbers(copy.deepcopy(model), batch)
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, num_beams=3), expected)
    assert_the_same(numbers(model, batch), want)
    assert steps
    assert None not in steps


def test_beams_read_one_copy_of_a_picture() -> None:
    model: Any = mllama()
    fastvlm.patch(model)
    seen = []
    model.model.vision_model.register_forward_hook(lambda m, args, out: seen.append(out[0].shape))
    inputs = inputs_of([[4], [2], [4]])
    out = generate(model, inputs, num_beams=4, return_dict_in_generate=True)
    assert [shape[0] for shape in seen] == [3]
    layers = out.past_key_values.layers
    for index in (1, 3):
        keys, values = layers[index].packed
        assert keys.shape == (3 * 4 * 5, 2, 8)  # three pictures of four tiles of five tokens
        assert keys.is_contiguous()
        assert values.is_contiguous()
        # as transformers would have it, a row for each beam
        assert layers[index].keys.shape == (12, 2, 20, 8)


def test_the_text_model_by_itself() -> None:
    """Given states and a mask as its whole model makes them; and without a mask."""
    plain: Any = mllama().model.language_model
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    random = torch.Generator().manual_seed(3)
    states = torch.randn(2, 10, 32, generator=random)
    ids = torch.randint(3, VOCAB, (2, 6), generator=random)
    hidden = torch.zeros(2, 1, 6, 10)
    hidden[0, :, 2:, 7:] = torch.finfo(torch.float32).min
    hidden[1, :, 5, :4] = torch.finfo(torch.float32).min  # the last step sees others
    for attention in ("sdpa", "eager"):
        for mask in (hidden, None):
            read = {"cross_attention_states": states, "cross_attention_mask": mask}
            found = []
            for model in (plain, ours):
                model.set_attn_implementation(attention)
                with torch.no_grad():
                    first = model(
                        ids[:, :4],
                        **{
                            **read,
                            "cross_attention_mask": None if mask is None else mask[:, :, :4],
                        },
                    )
                    past, last = first.past_key_values, []
                    for step in (4, 5):
                        given = None if mask is None else mask[:, :, step : step + 1]
                        out = model(
                            ids[:, step : step + 1],
                            past_key_values=past,
                            cross_attention_mask=given,
                        )
                        last.append(out[0])
                found.append(torch.cat([first[0], *last], 1))
            assert torch.allclose(found[1], found[0], atol=2e-5), (attention, mask is None)


def test_a_mask_of_other_numbers_is_transformers_to_read() -> None:
    plain: Any = mllama().model.language_model
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    random = torch.Generator().manual_seed(3)
    given = {
        "cross_attention_states": torch.randn(2, 10, 32, generator=random),
        "cross_attention_mask": torch.randn(2, 1, 6, 10, generator=random),
    }
    ids = torch.randint(3, VOCAB, (2, 6), generator=random)
    with torch.no_grad():
        found = [model(ids, **given)[0] for model in (plain, ours)]
    assert torch.allclose(*found, atol=1e-5)


def test_another_picture_on_a_cache_that_has_one() -> None:
    """As in a conversation: its keys come behind those that are there."""
    plain: Any = mllama().model.language_model
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    for model in (plain, ours):
        model.set_attn_implementation("eager")
    random = torch.Generator().manual_seed(3)
    first, second = (torch.randn(2, 10, 32, generator=random) for _ in range(2))
    ids = torch.randint(3, VOCAB, (2, 9), generator=random)
    found = []
    for model in (plain, ours):
        with torch.no_grad():
            out = model(ids[:, :4], cross_attention_states=first)
            parts, past = [out[0]], out.past_key_values
            for at, states in ((4, None), (5, second), (6, None), (7, None)):
                out = model(
                    ids[:, at : at + 1], past_key_values=past, cross_attention_states=states
                )
                parts.append(out[0])
        found.append(torch.cat(parts, 1))
    assert torch.allclose(found[1], found[0], atol=2e-5)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_weights_in_fewer_bits(kind: str, steps: list[Any]) -> None:
    """The gates are small, so that what is written stays."""
    model: Any = mllama()
    expected = generate(model, inputs_of(PICTURES["of some"]), num_beams=2)
    report = fastvlm.patch(model, weights=kind)
    assert any("low_precision_linear" in entry.ops for entry in report.patched)
    got = generate(model, inputs_of(PICTURES["of some"]), num_beams=2)
    assert (got == expected).float().mean() > 0.5
    assert steps
    assert None not in steps


@pytest.mark.parametrize("when", ["before", "behind"])
def test_lora_is_called_not_bypassed(when: str) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    inputs, batch = inputs_of(PICTURES["two"]), batch_of()

    def adapted(model: nn.Module) -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)

    assert_adapted_is_the_same(mllama, adapted, inputs, batch, when)


def _write_gates(model: Any) -> None:
    open_gates(model, 1.5)


def _exchange(model: Any) -> None:
    for layer in model.model.language_model.layers:
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data * 1.1


@pytest.mark.parametrize("write", [_write_gates, _exchange])
def test_changed_weights_are_seen_by_the_next_step(write: Any) -> None:
    inputs, found = inputs_of(PICTURES["of some"]), []
    for patched in (False, True):
        model: Any = mllama()
        if patched:
            fastvlm.patch(model)
        parts, past = [], None
        for new in (inputs["input_ids"], *([[9]] * 3, [[10]] * 3, [[11]] * 3)):
            given = {**inputs, "input_ids": torch.as_tensor(new)}
            if past is not None:
                grown = past.get_seq_length() + 1 - inputs["attention_mask"].shape[1]
                for name in ("attention_mask", "cross_attention_mask"):
                    last = inputs[name][:, -1:]
                    given[name] = torch.cat([inputs[name], *[last] * grown], 1)
                del given["pixel_values"], given["aspect_ratio_ids"], given["aspect_ratio_mask"]
            with torch.no_grad():
                out = model(**given, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits[:, -1])
            write(model)
        found.append(torch.stack(parts))
    assert torch.allclose(*found, atol=5e-4)


@pytest.mark.parametrize("only", [("attention",), ("mlp", "norm"), ("loss", "linear", "mlp")])
def test_parts_of_it_alone(only: tuple[str, ...]) -> None:
    model, inputs = mllama(), inputs_of(PICTURES["two"])
    expected = generate(model, inputs, num_beams=2)
    want = numbers(copy.deepcopy(model), batch_of())
    fastvlm.patch(model, only=only)
    assert torch.equal(generate(model.eval(), inputs, num_beams=2), expected)
    assert_the_same(numbers(model, batch_of()), want)


def test_gates_that_are_shut_as_published_models_begin() -> None:
    model, inputs = mllama(), inputs_of(PICTURES["two"])
    open_gates(model, 0.0)
    expected = generate(model, inputs, num_beams=3)
    want = numbers(copy.deepcopy(model), batch_of())
    fastvlm.patch(model)
    assert torch.equal(generate(model.eval(), inputs, num_beams=3), expected)
    assert_the_same(numbers(model, batch_of()), want)


def test_a_copy_of_the_class_is_left_alone() -> None:
    class Copy(tf.MllamaTextModel):
        pass

    Copy.__module__ = "elsewhere"
    model: Any = mllama()
    model.model.language_model.__class__ = Copy
    expected = generate(model, inputs_of(PICTURES["two"]))
    report = fastvlm.patch(model)
    assert any("a copy cannot be tried" in (e.reason or "") for e in report.skipped)
    assert torch.equal(generate(model, inputs_of(PICTURES["two"])), expected)
