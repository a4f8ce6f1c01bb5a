"""patch(model, compute=...): what is multiplied in int8 or bfloat16 then, and what is not."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from models import FAMILIES, Family
from torch import Tensor, nn

import fastvlm
from fastvlm import ops
from fastvlm.nn import compute as narrow
from fastvlm.nn import low_precision
from fastvlm.patching.patch import is_patched
from fastvlm.patching.weights import runs_in

OPS = ("int8_linear", "int8_gelu_mlp", "bf16_linear", "bf16_gelu_mlp")


@pytest.fixture(params=["int8", "bf16"])
def compute(request: pytest.FixtureRequest) -> str:
    if (why := narrow.unavailable(request.param)) is not None:
        pytest.skip(why)
    return str(request.param)


@pytest.fixture
def linear(compute: str) -> str:
    """The op of one product in that arithmetic."""
    return runs_in(compute)["residual_linear"]


@pytest.fixture
def mlp(compute: str) -> str:
    return runs_in(compute)["gelu_mlp"]


@pytest.fixture
def any_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the few rows of a tiny model were many."""
    monkeypatch.setattr(narrow, "FEWEST_ROWS", 1)
    monkeypatch.setattr(narrow, "FEWEST_INPUTS", 1)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops of these arithmetics that were called."""
    found: list[str] = []

    def spied(was: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(was.__name__)
            return was(*args, **kwargs)

        return call

    for name in OPS:
        monkeypatch.setattr(ops, name, spied(getattr(ops, name)))
    return found


def logits(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**FAMILIES[family].training(model)).logits
    return out


def test_the_change_is_small_and_reported(
    family: Family, any_rows: None, monkeypatch: pytest.MonkeyPatch, compute: str, linear: str
) -> None:
    model = family.build()
    inputs = family.training(model)
    ran: set[nn.Module] = set()

    def copy_of(layer: Any, was: Any = narrow.copy_of) -> Any:
        ran.add(layer)
        return was(layer)

    monkeypatch.setattr(narrow, "copy_of", copy_of)
    report = fastvlm.patch(model, compute=compute)
    change = fastvlm.log_prob_change(model, inputs)
    said = {e.module for e in report.entries if e.kind == "Linear" and linear in e.ops}
    names = {name for name, module in model.named_modules() if module in ran}
    # a tower's projection may stand before the stacks, and be read without being called
    assert names == said, (said - names, names - said)
    # random weights, spread wide: far more sensitive than a trained model
    assert 0 < change.mean < 0.05
    assert change.agreement > 0.8


@pytest.mark.parametrize("name", ["florence2", "t5gemma", "bart"])
def test_the_way_back(name: str, any_rows: None, called: list[str], compute: str) -> None:
    model = FAMILIES[name].build()
    plain = logits(model, name)
    fastvlm.patch(model)
    ours = logits(model, name)
    fastvlm.patch(model, compute=compute)
    assert not torch.equal(logits(model, name), ours)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        called.clear()
        model(**FAMILIES[name].training(model))
        assert not called
    fastvlm.patch(model)
    assert torch.equal(logits(model, name), ours)
    fastvlm.patch(model, compute=compute)
    fastvlm.unpatch(model)
    assert torch.equal(logits(model, name), plain)
    assert not any(module in low_precision._copies for module in model.modules())
    assert not any(is_patched(module) for module in model.modules())


def test_training_computes_as_without(
    family: Family, any_rows: None, called: list[str], compute: str
) -> None:
    ours, narrow_too = family.build().train(), family.build().train()
    fastvlm.patch(ours)
    fastvlm.patch(narrow_too, compute=compute)
    losses = []
    for model in (ours, narrow_too):
        torch.manual_seed(0)
        loss = model(**family.training(model)).loss
        loss.backward()
        losses.append(loss)
    assert not called
    assert torch.equal(*losses)
    for (name, p), q in zip(ours.named_parameters(), narrow_too.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or q.grad is None or torch.equal(p.grad, q.grad), name


def test_few_rows_are_multiplied_as_they_are(called: list[str], compute: str) -> None:
    layer = nn.Linear(200, 30)
    holder = nn.ModuleList([layer])
    ours = copy.deepcopy(holder)
    ours[0].__class__ = type("Patched", (narrow.ComputeLinear,), {"compute": compute})
    with torch.no_grad():
        for rows in (1, 64):
            x = torch.randn(rows, 200)
            assert torch.equal(ours[0](x), ops.linear(x, layer.weight, layer.bias))
        assert not called
        x = torch.randn(5, 13, 200)
        bf16 = layer.weight.bfloat16(), None
        weight, scale = bf16 if compute == "bf16" else ops.quantize_rows(layer.weight)
        if narrow.rounds_rows(compute):
            want = ops.bf16_linear(x, weight, scale, layer.bias)
        else:
            assert scale is not None
            want = ops.int8_linear(x, weight, scale, layer.bias)
        called.clear()
        assert torch.equal(ours[0](x), want)
    assert called


def test_a_compiler_meets_the_layer_as_it_is(compute: str, called: list[str]) -> None:
    layer = nn.Linear(192, 30)
    x = torch.randn(80, 192)
    with torch.no_grad():
        plain = ops.linear(x, layer.weight, layer.bias)
        layer.__class__ = type("Patched", (narrow.ComputeLinear,), {"compute": compute})
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), plain)
        assert not called


def test_the_tower_runs_in_it(
    any_rows: None, called: list[str], compute: str, linear: str, mlp: str
) -> None:
    model = models.florence2()
    tower = model.model.vision_tower
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = tower(x).last_hidden_state
        report = fastvlm.patch(model, compute=compute)
        ours = tower(x).last_hidden_state
    halves = [e for e in report.entries if "depthwise_conv_norm" in e.ops]
    assert halves
    assert all({linear, mlp} <= set(e.ops) for e in halves)
    assert {linear, mlp} <= set(called)
    off = (ours - plain).abs().mean() / plain.abs().mean()
    assert 0 < off < 0.05


def test_the_tower_has_the_arithmetic_of_autocast_under_it(any_rows: None, compute: str) -> None:
    model, other = models.florence2(), models.florence2()
    fastvlm.patch(model, compute=compute)
    fastvlm.patch(other)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, plain = (m.model.vision_tower(x).last_hidden_state for m in (model, other))
    assert torch.equal(ours, plain)


def test_a_changed_weight_is_quantized_again(any_rows: None, compute: str) -> None:
    model, other = models.bart(), models.bart()
    fastvlm.patch(model, compute=compute)
    logits(model, "bart")
    with torch.no_grad():
        for changed in (model, other):
            for layer in changed.model.encoder.layers:
                layer.fc1.weight.mul_(1.5)
                layer.self_attn.q_proj.weight.add_(0.1)
    fastvlm.patch(other, compute=compute)
    assert torch.equal(logits(model, "bart"), logits(other, "bart"))


def test_a_weight_that_int8_cannot_hold_is_left_alone(any_rows: None, compute: str) -> None:
    model = models.bart()
    name = "model.encoder.layers.0.self_attn.q_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = float("inf")
    report = fastvlm.patch(model, compute=compute)
    entry = next(e for e in report.entries if e.module == name)
    why = f"{name}: its weight holds a NaN or an infinity, which int8 cannot"
    assert (entry.ops == ("linear",)) == (why in str(report)) == (compute == "int8")


def test_a_model_of_that_arithmetic_is_left_alone(any_rows: None, called: list[str]) -> None:
    if (why := narrow.unavailable("bf16")) is not None:
        pytest.skip(why)
    model = models.bart().bfloat16()
    report = fastvlm.patch(model, compute="bf16")
    assert "more: its weight is bfloat16, and so is its arithmetic" in str(report)
    with torch.no_grad():
        model(**FAMILIES["bart"].training(model))
    assert not called


def test_where_it_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch, compute: str) -> None:
    """The layers stay as they are, and the report says why."""
    monkeypatch.setattr(narrow, "unavailable", lambda compute: "this CPU lacks it")
    model = models.bart()
    report = fastvlm.patch(model, compute=compute)
    assert "arithmetic here: this CPU lacks it" in str(report)
    assert not any(set(OPS) & set(entry.ops) for entry in report.entries)


def test_beside_weights_of_fewer_bits(
    any_rows: None, called: list[str], compute: str, linear: str
) -> None:
    model = models.bart()
    report = fastvlm.patch(model, weights=compute, compute=compute)
    entry = next(e for e in report.entries if e.module == "model.decoder.layers.0.fc1")
    assert entry.ops == ("low_precision_linear", linear)
    logits(model, "bart")
    assert called
    # one copy serves both
    assert set(low_precision._copies[model.model.decoder.layers[0].fc1]) == {compute}
    both = fastvlm.log_prob_change(model, FAMILIES["bart"].training(model))
    assert both.agreement > 0.8
    # the decoder reads its copies, as in a step, however many rows the labels make
    ran: list[Any] = []
    with pytest.MonkeyPatch.context() as patch, narrow.as_in_steps():
        was = narrow.copy_of
        patch.setattr(narrow, "copy_of", lambda layer: (ran.append(layer), was(layer))[1])
        logits(model, "bart")
    assert ran
    assert not any(isinstance(layer, low_precision.LowPrecisionLinear) for layer in ran)
    with pytest.raises(RuntimeError, match=rf'weights="{compute}" is for decoding'):
        model(**FAMILIES["bart"].training(model))


def test_the_report_names_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of few inputs are not quantized; those of an MLP are, of any."""
    if narrow.unavailable("int8") is not None:
        pytest.skip("no int8 arithmetic here")
    monkeypatch.setattr(narrow, "rounds_rows", lambda compute: False)  # as without AMX
    report = fastvlm.patch(models.bart(), compute="int8")
    ops_of = {entry.module: entry.ops for entry in report.entries}
    layer = "model.encoder.layers.0"
    assert ops_of[f"{layer}.self_attn.q_proj"] == ("linear",)
    assert "int8_gelu_mlp" in ops_of[layer]
    monkeypatch.setattr(narrow, "FEWEST_INPUTS", 1)
    (q,) = (e for e in fastvlm.patch(models.bart(), compute="int8").entries
            if e.module == f"{layer}.self_attn.q_proj")  # fmt: skip
    assert q.ops == ("linear", "int8_linear")


def test_weights_that_are_left_alone(any_rows: None, called: list[str], compute: str) -> None:
    class Wrapped(Tensor):
        """A kind of tensor that PyTorch dispatches."""

    model = models.bart()
    layer = model.model.encoder.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Wrapped))
    report = fastvlm.patch(model, compute=compute)
    assert "its weight is a Wrapped, for which PyTorch chooses the kernels" in str(report)
    wide = models.bart().double()
    report = fastvlm.patch(wide, compute=compute)
    (note,) = [note for note in report.notes if "arithmetic" in note]
    assert "arithmetic is for float32, bfloat16 and float16; its weight is torch.float64" in note
    with torch.no_grad():
        wide(**FAMILIES["bart"].training(wide))
    assert not called


def test_what_does_not_fit_is_said_as_without(any_rows: None) -> None:
    layer = nn.Linear(70, 30)
    layer.__class__ = narrow.ComputeLinear
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"linear: weight must be of shape \[any, 69\]"):
            layer(torch.randn(80, 69))
        with pytest.raises(ValueError, match="linear: weight must be of the dtype of x"):
            layer(torch.randn(80, 70).bfloat16())


def test_adapters_in_the_tower_keep_their_arithmetic(
    any_rows: None, compute: str, linear: str
) -> None:
    peft = pytest.importorskip("peft")
    model = models.florence2()
    config = peft.LoraConfig(r=4, target_modules=["qkv", "q_proj"])
    report = fastvlm.patch(peft.get_peft_model(model, config), compute=compute)
    adapters = [e for e in report.entries if "lora_" in e.module]
    assert adapters
    assert not [e.module for e in adapters if linear in e.ops]
    assert any("base_layer" in e.module and linear in e.ops for e in report.entries)


def test_a_copy_of_the_model_computes_the_same(any_rows: None, compute: str, linear: str) -> None:
    model = models.bart()
    fastvlm.patch(model, compute=compute)
    assert torch.equal(logits(copy.deepcopy(model), "bart"), logits(model, "bart"))
    with fastvlm.patched(models.bart(), compute=compute) as report:
        assert any(linear in e.ops for e in report.entries)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(beams: int, any_rows: None, called: list[str], compute: str) -> None:
    family = FAMILIES["florence2"]
    model = family.build().eval()
    inputs = {k: v for k, v in family.training(model).items() if k not in ("labels",)}
    inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    fastvlm.patch(model, compute=compute)
    tokens = model.generate(**inputs, num_beams=beams, max_new_tokens=8, do_sample=False)
    assert called
    assert tokens.shape[0] == inputs["input_ids"].shape[0]


@pytest.mark.parametrize("narrow_first", [True, False])
def test_features_of_other_arithmetic_are_refused(
    tmp_path: Any, narrow_first: bool, compute: str
) -> None:
    first, then = (compute, None) if narrow_first else (None, compute)
    model = models.florence2().eval().requires_grad_(False)
    fastvlm.patch(model, compute=first)
    features = fastvlm.VisionFeatures(tmp_path, model)
    model.model.vision_tower(features.pixel_values(torch.ones(1, 3, 64, 64)))
    features.detach()
    fastvlm.patch(model, compute=then)
    with pytest.raises(ValueError, match=f"computed in {compute}"):
        fastvlm.VisionFeatures(tmp_path, model)


def test_bad_input_is_refused(compute: str) -> None:
    model = models.bart()
    with pytest.raises(
        ValueError, match="compute must be None or one of 'int8', 'bf16'; got 'int4'"
    ):
        fastvlm.patch(model, compute="int4")
    with pytest.raises(
        ValueError, match=f"compute='{compute}' changes linear layers, and only leaves"
    ):
        fastvlm.patch(model, compute=compute, only="attention")
    fastvlm.patch(model, compute=compute)
    with pytest.raises(ValueError, match=r"patched without weights= and compute="):
        fastvlm.check(model, FAMILIES["bart"].training(model))
