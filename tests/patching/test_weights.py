"""patch(model, weights=...): decoding with weights in fewer bits, and what that leaves alone."""

from __future__ import annotations

import models
import pytest
import torch
from models import FAMILIES, Family
from torch import Tensor, nn

import fastvlm
from fastvlm import ops
from fastvlm.nn import low_precision
from fastvlm.patching.patch import is_patched

STORAGES = ("bf16", "int8")


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest) -> str:
    return request.param


def logits(model: nn.Module, family: str = "bart") -> Tensor:
    with torch.no_grad():
        return model(**FAMILIES[family].training(model)).logits


def stored(module: nn.Module) -> Tensor:
    ((_, copy),) = low_precision._copies[module].values()
    return copy.weight


def widened(storage: str, family: str = "bart") -> nn.Module:
    """A model whose decoder holds the values that the stored weights stand for."""
    model = FAMILIES[family].build()
    report = fastvlm.patch(FAMILIES[family].build(), weights=storage)
    with torch.no_grad():
        for entry in report.entries:
            if "low_precision_linear" in entry.ops and entry.kind == "Linear":
                layer = model.get_submodule(entry.module)
                # untied: the embedding keeps its own values
                layer.weight = nn.Parameter(layer.weight.clone())
                if storage == "bf16":
                    layer.weight.copy_(layer.weight.bfloat16())
                else:
                    int8, scale = ops.quantize_rows(layer.weight)
                    layer.weight.copy_(int8 * scale[:, None])
    return model


def test_outputs_are_those_of_the_stored_weights(storage: str) -> None:
    model = models.bart()
    own = logits(model)
    fastvlm.patch(model, weights=storage)
    got = logits(model)
    assert torch.allclose(got, logits(widened(storage)), atol=1e-4)
    assert not torch.allclose(got, own, atol=1e-4)


def test_the_change_is_small_and_reported(family: Family, storage: str) -> None:
    model = family.build()
    inputs = family.training(model)
    fastvlm.patch(model, weights=storage)
    before = [type(m) for m in model.modules()]
    change = fastvlm.log_prob_change(model, inputs)
    assert [type(m) for m in model.modules()] == before
    # random weights, spread wide: far more sensitive than a trained model
    assert 0 < change.mean < (0.01 if storage == "bf16" else 0.05)
    assert change.mean <= change.max < (0.03 if storage == "bf16" else 0.2)
    assert change.agreement > 0.8
    mask = inputs.get("attention_mask")
    if model.config.is_encoder_decoder:
        mask = inputs["labels"] != -100
    assert change.positions == int(mask.sum())
    assert f"at {change.positions} positions: off by" in str(change)


def test_log_prob_change_is_what_it_says() -> None:
    model, ours = models.gemma2(), models.gemma2()
    fastvlm.patch(ours, weights="int8")
    fastvlm.patch(model)
    inputs = {"input_ids": torch.randint(3, 90, (2, 7)), "attention_mask": torch.ones(2, 7).long()}
    inputs["attention_mask"][1, 4:] = 0
    with torch.no_grad():
        own, other = (m(**inputs).logits.log_softmax(-1) for m in (model, ours))
    seen = inputs["attention_mask"].bool()
    best = own.argmax(-1)
    off = (own - other).gather(-1, best[..., None])[..., 0].abs()[seen]
    change = fastvlm.log_prob_change(ours, inputs)
    assert change.positions == 11
    assert change.mean == pytest.approx(off.mean().item(), abs=1e-6)
    assert change.max == pytest.approx(off.max().item(), abs=1e-6)
    same = (other.argmax(-1) == best)[seen].double().mean().item()
    assert change.agreement == pytest.approx(same)


def test_log_prob_change_runs_in_eval_mode_and_restores() -> None:
    model = models.bart(dropout=0.5).train()
    model.model.encoder.eval()
    modes = [m.training for m in model.modules()]
    fastvlm.patch(model, weights="bf16")
    inputs = FAMILIES["bart"].training(model)
    first, second = (fastvlm.log_prob_change(model, inputs) for _ in range(2))
    assert first == second
    assert [m.training for m in model.modules()] == modes


def test_log_prob_change_refuses_what_it_cannot_compare() -> None:
    model = models.bart()
    inputs = FAMILIES["bart"].training(model)
    fastvlm.patch(model)
    with pytest.raises(ValueError, match="model must be patched with weights"):
        fastvlm.log_prob_change(model, inputs)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        fastvlm.log_prob_change("bart", inputs)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"inputs must be a mapping, .*; got list"):
        fastvlm.log_prob_change(model, [inputs])  # type: ignore[arg-type]
    fastvlm.patch(model, weights="bf16")
    with pytest.raises(ValueError, match="must have labels or decoder_input_ids; got input_ids"):
        fastvlm.log_prob_change(model, {"input_ids": inputs["input_ids"]})
    with pytest.raises(ValueError, match="inputs must be without past_key_values"):
        fastvlm.log_prob_change(model, {**inputs, "past_key_values": object()})
    nothing = torch.full_like(inputs["labels"], -100)
    with pytest.raises(ValueError, match="inputs must have a position"):
        fastvlm.log_prob_change(model, {**inputs, "labels": nothing})


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_generates_the_tokens_of_the_stored_weights(name: str, beams: int, storage: str) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    settings = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams}
    expected = widened(storage, name).generate(**inputs, **settings)
    fastvlm.patch(model, weights=storage)
    assert torch.equal(model.generate(**inputs, **settings), expected)


def test_the_last_patch_decides_and_the_block_form_restores(storage: str) -> None:
    model = models.bart()
    other = next(s for s in STORAGES if s != storage)
    own = logits(model)
    fastvlm.patch(model)
    plain = logits(model)
    first = fastvlm.patch(model, weights=storage)
    expected, old = logits(model), stored(model.lm_head)
    assert fastvlm.patch(model, weights=storage).entries == first.entries
    assert torch.equal(logits(model), expected)
    assert stored(model.lm_head) is not old, "patching again drops the copies"
    with fastvlm.patched(model, weights=other):
        assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    with fastvlm.patched(model):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), expected)
    fastvlm.patch(model, only="attention")
    assert torch.equal(logits(model), expected)
    fastvlm.patch(model)
    assert torch.equal(logits(model), plain)
    fastvlm.unpatch(model)
    with fastvlm.patched(model, weights=storage):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), own)


def test_what_a_step_does_not_read_stays_as_it_is(storage: str) -> None:
    for family in ("florence2", "t5gemma"):
        report = fastvlm.patch(FAMILIES[family].build(), weights=storage)
        low = {e.module for e in report.entries if "low_precision_linear" in e.ops}
        assert not any(".encoder." in name for name in low)
        assert not any("vision" in name for name in low)
        cross = [name for name in low if "encoder_attn." in name or "cross_attn." in name]
        assert {name.rsplit(".", 1)[-1][0] for name in cross} == {"q", "o"}


def test_report_counts_the_bytes_of_a_step() -> None:
    model = models.gemma2()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    numbers = sum(m.weight.numel() for m in linear)
    rows = sum(m.weight.shape[0] for m in linear)
    assert fastvlm.patch(model).step_bytes is None
    assert fastvlm.patch(model, weights="bf16").step_bytes == (4 * numbers, 2 * numbers)
    report = fastvlm.patch(model, weights="int8")
    assert report.step_bytes == (4 * numbers, numbers + 4 * rows)
    text = str(report)
    assert "a decoding step reads 0.03 MiB of weights instead of 0.11 MiB" in text
    assert "int8     low_precision_linear" in text
    mlp = next(e for e in report.entries if e.module.endswith("layers.0.mlp"))
    assert mlp.ops == ("low_precision_linear",)
    assert "a decoding step" not in str(fastvlm.patch(model))


def test_a_bfloat16_model_has_nothing_to_convert() -> None:
    model = models.bart().to(torch.bfloat16)
    fastvlm.patch(model)
    expected = logits(model)
    report = fastvlm.patch(model, weights="bf16")
    assert torch.equal(logits(model), expected)
    assert "weights, as without fastvlm" in str(report)
    assert {e.reads[0] for e in report.entries if e.reads} == {"bfloat16"}
    own, read = fastvlm.patch(model, weights="int8").step_bytes or (0, 0)
    assert read < 0.6 * own
    assert fastvlm.log_prob_change(model, FAMILIES["bart"].training(model)).mean < 0.1


def test_bad_weights_are_refused() -> None:
    model = models.bart()
    for bad in ("int4", "BF16", torch.int8, 8):
        with pytest.raises(ValueError, match=r"weights must be None or one of 'bf16', 'int8'; got"):
            fastvlm.patch(model, weights=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights='int8' changes linear layers, and only leaves"):
        fastvlm.patch(model, weights="int8", only=["mlp", "norm"])
    assert not any(is_patched(m) for m in model.modules())
    fastvlm.patch(model, weights="int8", only="linear")
    logits(model)


@pytest.mark.slow
@pytest.mark.turns(2)
def test_compiles_with_a_break_at_each_layer(storage: str) -> None:
    torch._dynamo.reset()
    model = models.bart()
    fastvlm.patch(model, weights=storage)
    expected = logits(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(compiled(**FAMILIES["bart"].training(model)).logits, expected)
        layer = model.model.decoder.layers[0].fc1
        layer.weight.add_(1.0)
        got = compiled(**FAMILIES["bart"].training(model)).logits
    assert torch.allclose(got, logits(model), atol=1e-5)
    assert not torch.allclose(got, expected, atol=1e-5)
