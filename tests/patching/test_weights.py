"""patch(model, weights=...): decoding with weights in fewer bits, and what that leaves alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
import transformers as tf
from models import FAMILIES, Family
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastvlm
from fastvlm import ops
from fastvlm.nn import low_precision
from fastvlm.patching.patch import PatchError, is_patched
from fastvlm.patching.weights import is_low_precision

STORAGES = ("bf16", "int8")


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest) -> str:
    return request.param


def logits(model: nn.Module, family: str = "bart") -> Tensor:
    with torch.no_grad():
        return model(**FAMILIES[family].training(model)).logits


def stored(module: nn.Module) -> Tensor:
    return low_precision._copies[module][1].weight


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
    fastvlm.patch(model, weights="bf16")
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


def test_state_is_not_touched(family: Family, storage: str) -> None:
    model = family.build()
    batch = family.training(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [set(vars(m)) for m in model.modules()]
    parameters, classes = list(model.parameters()), [type(m) for m in model.modules()]
    with torch.no_grad():
        expected = model(**batch).logits
        fastvlm.patch(model, weights=storage)
        model(**batch)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        fastvlm.unpatch(model)
        assert [type(m) for m in model.modules()] == classes
        assert [set(vars(m)) for m in model.modules()] == attributes
        assert torch.equal(model(**batch).logits, expected)
    assert not any(m in low_precision._copies for m in model.modules())


def test_save_pretrained_saves_the_weights_themselves(tmp_path: Path) -> None:
    model = models.bart()
    expected = logits(model)
    fastvlm.patch(model, weights="int8")
    logits(model)
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again.eval()), expected)


def optimizer_step(model: nn.Module, layer: nn.Linear) -> None:
    layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=1.0).step()
    layer.weight.grad = None


def load(model: nn.Module, layer: nn.Linear) -> None:
    layer.load_state_dict({**layer.state_dict(), "weight": torch.randn_like(layer.weight)})


def replace(model: nn.Module, layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def swap_data(model: nn.Module, layer: nn.Linear) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def write_through_data(model: nn.Module, layer: nn.Linear) -> None:
    layer.weight.data += torch.randn_like(layer.weight)


def in_inference_mode(model: nn.Module, layer: nn.Linear) -> None:
    with torch.inference_mode():
        layer.weight[-1, -1] += 1.0


def swap_twice(model: nn.Module, layer: nn.Linear) -> None:
    """The second may lie where the first was."""
    for _ in range(2):
        layer.weight.data = torch.randn_like(layer.weight)


def there_and_back(model: nn.Module, layer: nn.Linear) -> None:
    model.double()
    model.float()
    with torch.no_grad():
        layer.weight.add_(1.0)


UPDATES = (
    optimizer_step,
    load,
    replace,
    swap_data,
    write_through_data,
    in_inference_mode,
    swap_twice,
    there_and_back,
)


@pytest.mark.parametrize("update", UPDATES, ids=lambda f: f.__name__)
def test_a_changed_weight_is_stored_anew(
    update: Callable[[nn.Module, nn.Linear], None], storage: str
) -> None:
    model = models.bart()
    fastvlm.patch(model, weights=storage)
    logits(model)
    layer = model.model.decoder.layers[1].fc1
    old = stored(layer)
    update(model, layer)
    got = logits(model)
    assert stored(layer) is not old
    fresh = models.bart()
    fresh.load_state_dict(model.state_dict())
    fastvlm.patch(fresh, weights=storage)
    assert torch.equal(got, logits(fresh))
    kept = stored(layer)
    logits(model)
    assert stored(layer) is kept, "stored again although nothing changed"


def test_the_copy_of_a_wider_dtype_follows_a_cast(storage: str) -> None:
    model = models.bart()
    fastvlm.patch(model, weights=storage)
    logits(model)
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    model.float()
    assert logits(model).dtype == torch.float32


def test_training_is_refused_with_what_to_do(storage: str) -> None:
    model = models.bart()
    batch = FAMILIES["bart"].training(model)
    fastvlm.patch(model, weights=storage)
    wanted = rf'weights="{storage}" is for decoding.*inference_mode\(\).*to train, patch it without'
    with pytest.raises(RuntimeError, match=wanted):
        model(**batch)
    model.requires_grad_(False)
    model(**batch)  # nothing wants a gradient
    embeddings = torch.randn(3, 7, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match=wanted):
        model.model.decoder.layers[0].fc1(embeddings)
    fastvlm.patch(model.requires_grad_(True))
    model(**batch).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_deepcopy_and_pickle_keep_the_storage_and_not_the_copies(storage: str) -> None:
    model = models.bart()
    size = len(pickle.dumps(model))
    fastvlm.patch(model, weights=storage)
    expected = logits(model)
    pickled = pickle.dumps(model)
    assert len(pickled) < size * 1.1
    for again in (copy.deepcopy(model), pickle.loads(pickled)):
        assert is_low_precision(again.lm_head)
        assert again.lm_head not in low_precision._copies
        assert torch.equal(logits(again), expected)
        assert stored(again.lm_head) is not stored(model.lm_head)
        fastvlm.unpatch(again)
        assert not any(is_patched(m) for m in again.modules())
    assert torch.equal(logits(model), expected)


def test_copies_go_with_the_model() -> None:
    kept = len(low_precision._copies), len(low_precision._shared)
    model = models.bart()
    fastvlm.patch(model, weights="int8")
    logits(model)
    assert len(low_precision._copies) > kept[0]
    fastvlm.unpatch(model)
    assert (len(low_precision._copies), len(low_precision._shared)) == kept


def test_tied_weights_share_one_copy(storage: str) -> None:
    model = models.bart()
    layers = model.model.decoder.layers
    layers[1].fc1.weight = layers[0].fc1.weight
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    fastvlm.patch(model, weights=storage)
    logits(model)
    assert stored(layers[0].fc1) is stored(layers[1].fc1)
    assert model.lm_head.weight is embedding, "the head is still tied to the embedding"
    assert embedding.dtype == torch.float32
    with torch.no_grad():
        embedding.add_(1.0)
    old = stored(model.lm_head)
    logits(model)
    assert stored(model.lm_head) is not old


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


def test_hooks_are_called_and_parametrizations_are_left_alone() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = models.bart()
    layers = model.model.decoder.layers
    fired = []
    layers[0].fc1.register_forward_hook(lambda *args: fired.append(1))
    parametrize.register_parametrization(layers[1].fc1, "weight", Double())
    expected = logits(model)
    report = fastvlm.patch(model, weights="bf16")
    assert torch.allclose(logits(model), expected, atol=0.5)
    assert len(fired) == 2
    reasons = {e.module: e.reason for e in report.skipped}
    assert "does more than nn.Linear" in (reasons["model.decoder.layers.1.fc1"] or "")
    with pytest.raises(PatchError, match="strict"):
        fastvlm.patch(model, weights="bf16", strict=True)


def test_a_layer_parametrized_since_computes_with_its_own_weight() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = models.bart()
    fastvlm.patch(model, weights="int8")
    layer, x = model.model.decoder.layers[1].fc1, torch.randn(2, 32)
    want = nn.functional.linear(x, 2 * layer.weight, layer.bias)
    parametrize.register_parametrization(layer, "weight", Double())
    with torch.no_grad():
        assert torch.allclose(layer(x), want, atol=1e-5)


def test_adapters_keep_their_precision_and_a_merge_is_seen() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    model = peft.get_peft_model(models.bart(), config).eval()
    expected = logits(model)
    report = fastvlm.patch(model, weights="bf16")
    adapters = [e for e in report.entries if ".lora_" in e.module and ".decoder." in e.module]
    assert adapters
    assert all(e.ops == ("linear",) for e in adapters)
    base = [e for e in report.entries if ".base_layer" in e.module and ".decoder." in e.module]
    assert base
    assert all(e.ops == ("low_precision_linear",) for e in base)
    assert torch.allclose(logits(model), expected, atol=0.5)
    model.merge_adapter()  # writes through .data
    assert torch.allclose(logits(model), expected, atol=0.5)
    model.unmerge_adapter()
    assert torch.allclose(logits(model), expected, atol=0.5)


def test_weights_made_in_inference_mode_are_left_alone() -> None:
    with torch.inference_mode():
        model = models.bart()
        expected = model(**FAMILIES["bart"].training(model)).logits
        report = fastvlm.patch(model, weights="int8")
        got = model(**FAMILIES["bart"].training(model)).logits
    assert any("no change of it can be noticed" in (e.reason or "") for e in report.skipped)
    assert torch.allclose(got, expected, atol=1e-4)


def test_the_first_call_may_be_in_inference_mode() -> None:
    model = models.bart()
    fastvlm.patch(model, weights="int8")
    with torch.inference_mode():
        expected = model(**FAMILIES["bart"].training(model)).logits
    assert torch.equal(logits(model), expected)


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
