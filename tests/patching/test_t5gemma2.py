"""T5Gemma 2 and Gemma-3: what is their own. The rest is in test_families.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from gemma3_models import END_OF_IMAGE, GEMMA3, gemma3, t5gemma2
from models import PAD, VOCAB
from sameness import (
    assert_adapted_is_the_same,
    assert_the_same,
    assert_trains_the_same,
    assert_writes_the_same,
    numbers,
)
from test_families import generate
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import fastvlm
from fastvlm.patching import interposed, probe

OPS = {"self_attention", "cached_attention", "rope", "geglu_mlp", "rms_norm", "residual_rms_norm"}
MERGED = {*OPS, "cross_attention"}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "long": {"num_beams": 2, "max_new_tokens": 20, "min_new_tokens": 20},
}
NAMES = list(GEMMA3)


def inputs_of(name: str) -> dict[str, Tensor]:
    return GEMMA3[name].inputs(nn.Module())


def batch_of(name: str) -> dict[str, Tensor]:
    return GEMMA3[name].training(nn.Module())


@pytest.mark.parametrize("name", ["t5gemma2", "gemma3"])
def test_all_of_it_is_patched_and_nothing_else_changes(name: str) -> None:
    model = GEMMA3[name].build()
    before = {n: (id(p), p.data_ptr(), p.shape) for n, p in model.named_parameters()}
    kinds = {type(m) for m in model.modules()}
    report = fastvlm.patch(model)
    found = {op for entry in report.patched for op in entry.ops}
    assert found >= (OPS if name == "gemma3" else MERGED)
    assert {entry.reason for entry in report.skipped} <= {"runs once per image"}
    generate(model, inputs_of(name), num_beams=2)
    numbers(model, batch_of(name))
    assert {n: (id(p), p.data_ptr(), p.shape) for n, p in model.named_parameters()} == before
    fastvlm.unpatch(model)
    assert {type(m) for m in model.modules()} == kinds


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokens_by_a_step_that_is_written_down(name: str, steps: list[Any]) -> None:
    model, inputs = GEMMA3[name].build(), inputs_of(name)
    assert_writes_the_same(model, inputs, CASES, steps, strict="t5" not in name)


@pytest.mark.parametrize("name", NAMES)
def test_training_with_each_kind_of_checkpoint(name: str) -> None:
    assert_trains_the_same(GEMMA3[name].build(), batch_of(name))


def test_a_cache_that_was_turned_off_and_attentions() -> None:
    model, inputs = t5gemma2(), inputs_of("t5gemma2")
    model.set_attn_implementation("eager")
    ask = {"output_attentions": True, "return_dict_in_generate": True}
    expected = generate(model, inputs, use_cache=False), generate(model, inputs, **ask)
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, use_cache=False), expected[0])
    got = generate(model, inputs, **ask)
    assert torch.equal(got.sequences, expected[1].sequences)
    for ours, theirs in zip(got.cross_attentions, expected[1].cross_attentions):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_windows_of_any_length(window: int) -> None:
    """An even one reaches further behind a row of the encoder than before it."""
    model, batch = t5gemma2(sliding_window=window), batch_of("t5gemma2")
    want = numbers(copy.deepcopy(model), batch)
    fastvlm.patch(model)
    assert_the_same(numbers(model, batch), want)


def _steps(model: Any, write: Any) -> list[Tensor]:
    """Logits of a prefill and three steps, weights changed between them."""
    found, past = [], None
    inputs = inputs_of("t5gemma2-text")
    with torch.no_grad():
        states = model.get_encoder()(**inputs).last_hidden_state
        given = {
            "encoder_outputs": BaseModelOutput(states),
            "attention_mask": inputs["attention_mask"],
        }
        for new in ([0, 7, 9], [5], [END_OF_IMAGE], [3]):
            out = model(
                **given, decoder_input_ids=torch.tensor([new] * 3), past_key_values=past,
                use_cache=True,
            )  # fmt: skip
            past = out.past_key_values
            found.append(out.logits[:, -1])
            write(model)
    return found


def _nothing(model: nn.Module) -> None:
    pass


def _in_place(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        if "decoder" in name and ("q_norm" in name or "k_norm" in name or "proj" in name):
            weight.mul_(1.1)


def _exchanged(model: nn.Module) -> None:
    for module in model.model.decoder.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data * 1.1


def _the_end_of_an_image(model: nn.Module) -> None:
    model.model.decoder.embed_tokens.eoi_embedding.add_(1.0)


@pytest.mark.parametrize("write", [_nothing, _in_place, _exchanged, _the_end_of_an_image])
def test_changed_weights_are_seen_by_the_next_step(write: Any) -> None:
    plain = t5gemma2()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    still = _steps(copy.deepcopy(plain), _nothing)
    for got, want in zip(_steps(ours, write), _steps(plain, write)):
        assert torch.allclose(got, want, atol=3e-4)
    assert write is _nothing or not torch.allclose(still[2], want, atol=1e-2)


def test_the_row_of_the_end_of_an_image_is_trained() -> None:
    """In the text, and among the targets; the table is the head's as well."""
    model, batch = t5gemma2(), batch_of("t5gemma2")
    batch["labels"][0, 2] = END_OF_IMAGE
    want = numbers(copy.deepcopy(model), batch)
    report = fastvlm.patch(model)
    assert any("one gradient with the head" in entry.ops for entry in report.patched)
    assert_the_same(numbers(model, batch), want)
    assert model.model.decoder.embed_tokens.eoi_embedding.grad.abs().max() > 0


@pytest.mark.parametrize("when", ["before", "behind"])
def test_lora_is_called_not_bypassed(when: str) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    inputs, batch = inputs_of("t5gemma2"), batch_of("t5gemma2")

    def adapted(model: nn.Module) -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)

    assert_adapted_is_the_same(t5gemma2, adapted, inputs, batch, when)


def test_beams_read_one_copy_of_a_picture() -> None:
    model, inputs = t5gemma2(), inputs_of("t5gemma2")
    fastvlm.patch(model)
    out = generate(model, inputs, num_beams=4, return_dict_in_generate=True)
    tokens = int(inputs["attention_mask"].sum())
    for layer in out.past_key_values.cross_attention_cache.layers:
        keys, values = layer.packed
        assert keys.shape == values.shape == (tokens, 2, 16)


def test_rows_that_share_a_prompt() -> None:
    """Targets of one prompt in a call of their own, padded, against prompts that are repeated."""
    model, inputs = t5gemma2(), inputs_of("t5gemma2-text")
    labels = torch.randint(3, VOCAB - 2, (5, 7), generator=torch.Generator().manual_seed(7))
    labels[1, 4:] = labels[3, 2:] = -100
    of = torch.tensor([2, 0, 0, 1, 2])
    repeated = {name: value[of] for name, value in inputs.items()}
    want = numbers(copy.deepcopy(model), {**repeated, "labels": labels})
    fastvlm.patch(model)
    shared = {**inputs, "labels": labels, "prompt_of_target": of}
    assert_the_same(numbers(model, shared), want)


def _padded_prompt(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Targets that begin with padding, and two tokens at once behind them."""
    ids = torch.tensor([[PAD, PAD, 7, 8, 9], [0, 4, 5, 6, 7], [PAD, 0, 3, 4, 5]])
    mask = (ids != PAD).long()
    out = model(**inputs, decoder_input_ids=ids, decoder_attention_mask=mask, use_cache=True)
    found = [out.logits[mask == 1]]
    for more in (torch.tensor([[8], [9], [10]]), torch.tensor([[8, 9]] * 3)):
        mask = torch.cat([mask, torch.ones_like(more)], 1)
        out = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state),
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=more,
            decoder_attention_mask=mask,
            past_key_values=out.past_key_values,
        )
        found.append(out.logits.flatten(0, 1))
    return {"logits": torch.cat(found)}


def test_prompts_with_padding_and_several_tokens_at_once() -> None:
    model, inputs = t5gemma2(), inputs_of("t5gemma2")
    with torch.no_grad():
        want = _padded_prompt(model, inputs)["logits"]
        fastvlm.patch(model)
        assert torch.allclose(_padded_prompt(model, inputs)["logits"], want, atol=2e-4)


def test_a_static_cache_is_transformers_own() -> None:
    model, inputs = t5gemma2(), inputs_of("t5gemma2")
    settings = {"cache_implementation": "static", "disable_compile": True}
    expected = [generate(model, inputs, num_beams=n, **settings) for n in (1, 2)]
    fastvlm.patch(model)
    for n, tokens in zip((1, 2), expected):
        assert torch.equal(generate(model, inputs, num_beams=n, **settings), tokens)


@pytest.mark.parametrize("only", [("attention",), ("mlp", "norm"), ("loss", "linear", "mlp")])
def test_parts_of_it_alone(only: tuple[str, ...]) -> None:
    model, inputs, batch = t5gemma2(), inputs_of("t5gemma2"), batch_of("t5gemma2")
    expected, want = generate(model, inputs, num_beams=2), numbers(copy.deepcopy(model), batch)
    fastvlm.patch(model, only=only)
    assert torch.equal(generate(model.eval(), inputs, num_beams=2), expected)
    assert_the_same(numbers(model, batch), want)


def test_new_tokens_have_rows() -> None:
    model, inputs = t5gemma2(), inputs_of("t5gemma2")
    fastvlm.patch(model)
    plain = t5gemma2()
    for each in (plain, model):
        torch.manual_seed(3)
        each.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    assert torch.equal(generate(model, inputs, num_beams=2), generate(plain, inputs, num_beams=2))


def test_its_other_heads() -> None:
    for kind in (tf.T5Gemma2ForSequenceClassification, tf.T5Gemma2ForTokenClassification):
        torch.manual_seed(0)
        model = kind(t5gemma2().config).eval()
        inputs = inputs_of("t5gemma2-text")
        with torch.no_grad():
            want = model(**inputs, decoder_input_ids=inputs["input_ids"]).logits
            fastvlm.patch(model)
            got = model(**inputs, decoder_input_ids=inputs["input_ids"]).logits
        assert torch.allclose(got, want, atol=1e-5)


def test_without_a_kernel_its_attention_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, for now."""
    monkeypatch.setattr(interposed, "without_kernel", lambda *stack: "no kernel on mars yet")
    model, inputs = t5gemma2(), inputs_of("t5gemma2")
    expected = generate(model, inputs, num_beams=2)
    report = fastvlm.patch(model)
    assert {entry.reason for entry in report.skipped} >= {"no kernel on mars yet"}
    assert torch.equal(generate(model, inputs, num_beams=2), expected)


def test_gemma3_that_looks_ahead_is_left_alone() -> None:
    model = gemma3(use_bidirectional_attention=True)
    batch = inputs_of("gemma3")
    with torch.no_grad():
        want = model(**batch).logits
        report = fastvlm.patch(model)
        got = model(**batch).logits
    assert any("see those behind" in str(entry.reason) for entry in report.skipped)
    seen = batch["attention_mask"] == 1
    assert torch.allclose(got[seen], want[seen], atol=1e-4)


@pytest.mark.parametrize("name", ["t5gemma2-text", "gemma3"])
def test_it_passes_its_own_trial(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a version of transformers that nobody has tested: each stack is tried first."""
    monkeypatch.setattr(probe, "is_tested", lambda package: False)
    report = fastvlm.patch(GEMMA3[name].build())
    found = {op for entry in report.patched for op in entry.ops}
    assert found >= (OPS if name == "gemma3" else MERGED)


@pytest.mark.parametrize("part", ["q_norm", "k_norm"])
def test_a_class_that_only_looks_like_it_is_tried_first(part: str) -> None:
    class Other(type(t5gemma2().model.decoder.layers[0].self_attn.q_norm)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.01

    model, inputs = t5gemma2(), inputs_of("t5gemma2-text")
    for layer in model.model.decoder.layers:
        getattr(layer.self_attn, part).__class__ = Other
    expected = generate(model, inputs)
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs), expected)
