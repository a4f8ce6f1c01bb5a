"""Decoding with stored weights: what keeps its state, and how a changed weight is noticed."""

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
from test_weights import STORAGES, logits, stored
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastvlm
from fastvlm.nn import low_precision
from fastvlm.nn.linear import is_low_precision
from fastvlm.patching.patch import PatchError, is_patched


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest) -> str:
    return request.param


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
    fastvlm.log_prob_change(model, FAMILIES["bart"].training(model))
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
