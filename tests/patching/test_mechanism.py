"""patch, unpatch and patched: what they touch, and above all what they leave alone."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
import transformers as tf
from models import FAMILIES, RELATIVES, Family
from torch import Tensor, nn
from transformers.models.bart import modeling_bart

import fastvlm
from fastvlm.nn import compute as narrow
from fastvlm.ops import dispatch
from fastvlm.patching.patch import PatchError, is_patched


def logits(model: nn.Module, family: str = "bart") -> Tensor:
    with torch.no_grad():
        return model(**FAMILIES[family].training(model)).logits


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_state_dict_and_outputs_come_back(family: Family) -> None:
    model = family.build()
    batch = family.training(model)
    before, classes = state(model), [type(m) for m in model.modules()]
    with torch.no_grad():
        expected = model(**batch).logits
        fastvlm.patch(model)
        assert same_state(state(model), before)
        model(**batch)
        fastvlm.unpatch(model)
        assert same_state(state(model), before)
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(model(**batch).logits, expected)


def test_two_models_do_not_see_each_other() -> None:
    patched, other = models.bart(), models.bart()
    forward = modeling_bart.BartAttention.forward
    expected, classes = logits(other), [type(m) for m in other.modules()]
    fastvlm.patch(patched)
    assert modeling_bart.BartAttention.forward is forward
    assert torch.equal(logits(other), expected)
    assert [type(m) for m in other.modules()] == classes
    assert not any(is_patched(m) for m in other.modules())


def test_a_shared_config_is_not_touched() -> None:
    model = models.bart()
    before = model.config.to_dict()
    fastvlm.patch(model)
    assert model.config.to_dict() == before


def test_patched_modules_still_are_what_they_were() -> None:
    model = models.bart()
    fastvlm.patch(model)
    layer = model.model.decoder.layers[0]
    assert isinstance(layer, modeling_bart.BartDecoderLayer)
    assert isinstance(layer.fc1, nn.Linear)
    assert type(layer).__name__ == "BartDecoderLayer"
    assert type(model).__name__ == "BartForConditionalGeneration"


def test_patching_twice_is_patching_once() -> None:
    model = models.bart()
    first = fastvlm.patch(model)
    classes = [type(m) for m in model.modules()]
    second = fastvlm.patch(model)
    assert [type(m) for m in model.modules()] == classes
    assert second.entries == first.entries
    fastvlm.unpatch(model)
    fastvlm.unpatch(model)
    assert not any(is_patched(m) for m in model.modules())


def test_the_block_form_restores_also_after_an_error() -> None:
    model = models.bart()
    with pytest.raises(IndexError), fastvlm.patched(model):
        model.model.decoder.layers[99]
    assert not any(is_patched(m) for m in model.modules())


def test_the_block_form_leaves_an_outer_patch() -> None:
    model = models.bart()
    fastvlm.patch(model, only="linear")
    with fastvlm.patched(model):
        assert is_patched(model.model.decoder)
    assert is_patched(model.lm_head)
    assert not is_patched(model.model.decoder)


def test_pickle_and_deepcopy_keep_the_patch() -> None:
    model = models.bart()
    fastvlm.patch(model)
    expected = logits(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_patched(again.model.decoder)
        assert torch.equal(logits(again), expected)
        fastvlm.unpatch(again)
        assert not any(is_patched(m) for m in again.modules())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False)), expected)


def test_save_pretrained_knows_nothing_of_the_patch(tmp_path: Path) -> None:
    model = models.bart()
    expected = logits(model)
    fastvlm.patch(model)
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(again) is tf.BartForConditionalGeneration
    assert again.config.architectures == ["BartForConditionalGeneration"]
    assert torch.equal(logits(again.eval()), expected)


def test_moves_and_casts_go_on_working() -> None:
    model = models.bart()
    fastvlm.patch(model)
    assert logits(model.to(torch.bfloat16)).dtype == torch.bfloat16
    assert logits(model.float()).dtype == torch.float32


def test_only_names_kinds_of_ops() -> None:
    model = models.bart()
    report = fastvlm.patch(model, only=["linear"])
    assert {op for entry in report.patched for op in entry.ops} == {"linear"}
    assert any("not in only" in (entry.reason or "") for entry in report.skipped)
    with pytest.raises(ValueError, match=r"only must name some of 'attention'.*got 'atention'"):
        fastvlm.patch(model, only="atention")
    with pytest.raises(ValueError, match="only must name"):
        fastvlm.patch(model, only=[])


def test_report_is_a_table_with_the_reasons() -> None:
    text = str(fastvlm.patch(models.florence2()))
    assert "modules patched" in text
    assert "model.language_model.decoder.layers.*.encoder_attn (2x)" in text
    assert "cross_attention" in text
    assert "model.vision_tower.blocks.*.*.spatial_block.window_attn.qkv" in text
    assert "skipped: runs once per image" in text


def test_nothing_to_patch_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(PatchError, match=r"model must contain a Florence-2.*got Sequential"):
        fastvlm.patch(model)
    assert type(model[0]) is nn.Linear
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got"):
        fastvlm.patch("microsoft/Florence-2-base")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got"):
        fastvlm.unpatch(None)  # type: ignore[arg-type]


def test_an_error_names_each_reason_once() -> None:
    model = models.bart()
    with pytest.raises(PatchError, match="nothing can be patched") as caught:
        fastvlm.patch(model, only="mlp")  # its MLPs are computed with the norms behind them
    text = str(caught.value)
    assert len(text) < 600
    for floor in ("attention", "norm", "linear"):
        assert text.count(f"not in only: {floor}") == 1
    assert "model.encoder.layers.0.self_attn.k_proj and" in text
    with pytest.raises(PatchError, match=r"strict is set.* and \d+ more: not in only: linear"):
        fastvlm.patch(model, only=("attention", "norm"), strict=True)


def test_strict_makes_a_skip_an_error_and_changes_nothing() -> None:
    model = models.florence2()
    before, classes = state(model), [type(m) for m in model.modules()]
    with pytest.raises(PatchError, match=r"strict is set and modules were skipped.*projector"):
        fastvlm.patch(model, strict=True)
    assert [type(m) for m in model.modules()] == classes
    assert same_state(state(model), before)
    fastvlm.patch(models.bart(), strict=True)


@pytest.mark.parametrize("name", ["tanh", "gelu_10", "relu6"])
def test_an_activation_that_no_op_has_is_skipped_with_the_reason(name: str) -> None:
    """Two are clipped, far from 0: within they are GELU and ReLU."""
    model = models.bart(activation_function=name)
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.bias += 20
    expected = logits(model)
    report = fastvlm.patch(model)
    assert any("none that gelu_mlp has" in (entry.reason or "") for entry in report.skipped)
    assert torch.allclose(logits(model), expected, atol=1e-4)


def test_a_trainers_own_copy_of_a_class_is_found() -> None:
    """Structure and the family's name decide, not transformers' class objects."""
    model = models.bart()
    expected = logits(model)
    own = {}
    for kind in ("BartAttention", "BartEncoderLayer", "BartDecoderLayer"):
        base = getattr(modeling_bart, kind)
        body = {k: v for k, v in vars(base).items() if k not in ("__dict__", "__weakref__")}
        own[base] = type(f"Own{kind}", base.__bases__, body)
    for module in model.modules():
        module.__class__ = own.get(type(module), type(module))
    report = fastvlm.patch(model)
    kinds = {entry.kind for entry in report.patched}
    assert {"OwnBartAttention", "OwnBartDecoderLayer", "OwnBartEncoderLayer"} <= kinds
    assert torch.allclose(logits(model), expected, atol=1e-4)


def test_unpatch_refuses_a_class_wrapped_since() -> None:
    model = models.bart()
    fastvlm.patch(model)
    layer = model.model.decoder.layers[0]
    layer.__class__ = type("Wrapped", (type(layer),), {})
    with pytest.raises(PatchError, match=r"decoder.layers.0 was wrapped after patching by Wrapped"):
        fastvlm.unpatch(model)
    assert is_patched(model.lm_head)


@pytest.mark.parametrize("name", ["gemma2", "t5gemma"])
def test_padding_between_tokens_under_a_sliding_window(name: str) -> None:
    """The window counts padded columns in transformers: such a batch stays there."""
    model = FAMILIES[name].build()
    batch = FAMILIES[name].training(model)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["attention_mask"][:, 2:5] = 0
    with torch.no_grad():
        expected = model(**batch).logits
        fastvlm.patch(model)
        assert torch.allclose(model(**batch).logits, expected, atol=1e-4)


def test_a_cache_that_was_reset_reads_the_new_images() -> None:
    model = models.bart()
    fastvlm.patch(model)
    cache = model.model.decoder.new_cache()
    ids = torch.full((2, 1), 7)
    other = {"encoder_outputs": (torch.randn(2, 4, 32),), "decoder_input_ids": ids}

    def step(cache: object, states: Tensor) -> Tensor:
        given = {"encoder_outputs": (states,), "past_key_values": cache}
        with torch.no_grad():
            model(**given, decoder_input_ids=torch.full((2, 3), 7))
            return model(**given, decoder_input_ids=ids).logits

    with torch.no_grad():
        model(**other, past_key_values=cache)
        model(**other, past_key_values=cache)
    cache.reset()
    states = torch.randn(2, 6, 32)
    assert torch.equal(step(cache, states), step(model.model.decoder.new_cache(), states))


def test_a_relative_that_computes_more_is_left_alone_there() -> None:
    """Gemma-2's attention with a norm of values beside it, as later ones have."""
    model = models.gemma2()
    for layer in model.model.layers:
        layer.self_attn.v_norm = torch.nn.LayerNorm(16)
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
        report = fastvlm.patch(model)
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    reasons = [entry.reason or "" for entry in report.skipped]
    assert any("parts of its own: v_norm" in reason for reason in reasons)
    assert any(entry.ops == ("geglu_mlp",) for entry in report.patched)


def test_paligemma_keeps_its_attention_and_the_report_says_so() -> None:
    report = fastvlm.patch(models.paligemma2())
    reasons = {entry.module: entry.reason for entry in report.skipped}
    assert "masks of a prefix" in (reasons["model.language_model"] or "")
    assert "was skipped" in (reasons["model.language_model.layers.0.self_attn"] or "")
    assert "geglu_mlp" in {op for entry in report.patched for op in entry.ops}


def test_a_norm_without_a_bias_is_called() -> None:
    """A trainer's own copy may have one: residual_layer_norm wants both, the module does not."""
    model = models.bart()
    layer = model.model.decoder.layers[0]
    layer.final_layer_norm = torch.nn.LayerNorm(layer.embed_dim, bias=False)
    expected = logits(model)
    fastvlm.patch(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_the_report_says_where_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["bart"].build()
    assert not fastvlm.patch(model).notes
    kernels = dispatch.OPS["linear"].kernels
    broken = replace(kernels["cpu"], unavailable=lambda: "BuildError: no compiler:\nof any kind")
    monkeypatch.setitem(kernels, "cpu", broken)
    (note,) = fastvlm.patch(model).notes
    assert "kernels for cpu do not run here (BuildError: no compiler)" in note
    assert "python -m fastvlm env" in note


def test_the_report_names_a_stack_that_nobody_knows() -> None:
    (note,) = fastvlm.patch(RELATIVES["vit_gpt2"].build()).notes
    assert note.startswith("encoder.layers (1 of ViTLayer) runs as transformers computes it")


@pytest.mark.parametrize(
    ("rounds", "rows"), [(True, "rounded to bfloat16"), (False, "quantized to int8")]
)
def test_the_report_says_what_was_asked(
    rounds: bool, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "rounds_rows", lambda compute: rounds)
    notes = fastvlm.patch(FAMILIES["bart"].build(), weights="int8", compute="int8").notes
    assert notes[0].startswith('weights="int8": ')
    assert notes[1].endswith(f"the weights are int8, the rows {rows}")
