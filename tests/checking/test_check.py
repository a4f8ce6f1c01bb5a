"""fastvlm.check: what is the same, that the model is left as it came, and what is refused."""

from __future__ import annotations

import copy
import json
import random
from collections import UserDict
from typing import Any

import planted_faults
import pytest
import torch
from models import FAMILIES, Family
from torch import Tensor, nn

import fastvlm
from fastvlm.checking import exact, keeping
from fastvlm.patching.patch import is_patched

FEW: dict[str, Any] = {"generate": {"num_beams": 2, "max_new_tokens": 3}}


def bart() -> tuple[nn.Module, dict[str, Tensor]]:
    model = FAMILIES["bart"].build()
    return model, FAMILIES["bart"].training(model)


def what(result: fastvlm.Check) -> list[str]:
    return [v.what for v in result.verdicts]


def test_a_patch_is_the_same_in_each_family(family: Family) -> None:
    model = family.build()
    result = fastvlm.check(model, family.training(model), **FEW)
    assert result.ok, str(result)
    assert result.exit_code == 0
    assert {v.verdict for v in result.verdicts} == {"same"}
    names = " ".join(what(result))
    parts = ["logits beside the loss at", "training loss", "gradients", "greedy", "2 beams"]
    # Florence-2's labels alone say what its decoder is given
    shifts = hasattr(model, "prepare_decoder_input_ids_from_labels")
    if shifts or not model.config.is_encoder_decoder:
        parts.append("logits at")
    for part in parts:
        assert part in names
    assert [c.what for c in result.costs] == [
        "forward", "training step", "greedy tokens", "tokens of 2 beams",
    ]  # fmt: skip
    assert all(min(c.seconds) > 0 and min(c.mib) >= 0 for c in result.costs)
    assert "fastvlm.patch(" in result.patch_report
    assert not any(is_patched(m) for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_16_bits(name: str, dtype: torch.dtype) -> None:
    model = FAMILIES[name].build().to(dtype)
    result = fastvlm.check(model, FAMILIES[name].training(model), **FEW)
    assert result.ok, str(result)


@pytest.mark.parametrize("name", ["florence2", "t5gemma", "gemma2"])
def test_without_labels_a_model_is_compared_on_its_own_answer(name: str) -> None:
    model = FAMILIES[name].build()
    result = fastvlm.check(model, FAMILIES[name].inputs(model), **FEW)
    assert result.ok, str(result)
    assert "training loss" in what(result)


def test_exact_measures_by_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = bart()
    result = fastvlm.check(model, batch, generate=False, exact=True)
    assert result.ok, str(result)
    assert "off from float64" in result.yardstick
    monkeypatch.setattr(exact, "_free", lambda device: 1000)
    result = fastvlm.check(model, batch, generate=False, train=False, exact=True)
    assert result.ok
    assert any("float64 needs about" in note for note in result.notes)
    assert "spread" in result.yardstick


def test_exact_sees_what_is_off_by_a_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = bart()
    fastvlm.patch(model)
    planted_faults.scale_is_off(monkeypatch, model)
    assert not fastvlm.check(model, batch, generate=False, train=False, exact=True).ok


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything by identity, and the values of tensors."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "classes": [type(m) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "attributes": [
            {k: id(v) for k, v in vars(m).items() if k not in ("_parameters", "_buffers")}
            for m in model.modules()
        ],
        "hooks": [
            {k: list(v.items()) for k, v in vars(m).items() if "hooks" in k and isinstance(v, dict)}
            for m in model.modules()
        ],
        "tensors": {n: (id(t), t.data_ptr(), t.requires_grad) for n, t in tensors.items()},
        "values": {n: t.detach().clone() for n, t in tensors.items()},
        "grads": [(id(p.grad), p.grad) for p in model.parameters()],
        "config": model.config.to_dict(),
        "attention": [c._attn_implementation for c in keeping.configs_of(model)
                      if hasattr(c, "_attn_implementation")],
        "generation": copy.deepcopy(model.generation_config.to_dict()),
        "random": (torch.get_rng_state(), random.getstate()),
    }  # fmt: skip


def assert_as_before(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in ("classes", "modes", "attributes", "hooks", "tensors", "config", "attention",
                 "generation"):  # fmt: skip
        assert before[name] == after[name], name
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
    for (one, grad), (other, now) in zip(before["grads"], after["grads"]):
        assert one == other
        assert grad is None or torch.equal(grad, now)
    assert torch.equal(before["random"][0], after["random"][0])
    assert before["random"][1] == after["random"][1]


class Counter(nn.Module):
    """Changes a buffer at each call, as batch norms and spectral norms do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)


def _unusual(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model that has something of all that must come back."""
    model = FAMILIES[name].build()
    batch = FAMILIES[name].training(model)
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.25
    model.config.dropout_rate = 0.5
    model.train()
    next(model.children()).eval()
    model(**batch).loss.backward()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = None
    return model, batch


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_the_model_is_left_as_it_came(name: str, patched: bool) -> None:
    model, batch = _unusual(name)
    if patched:
        fastvlm.patch(model)
    steps: list[int] = []
    for parameter in model.parameters():
        if parameter.requires_grad:  # an optimizer in the backward pass
            parameter.register_post_accumulate_grad_hook(lambda p: steps.append(1))
    given = {n: v.clone() for n, v in batch.items()}
    before = state_of(model)
    result = fastvlm.check(model, batch, **FEW)
    assert_as_before(before, state_of(model))
    assert result.ok, str(result)
    assert not steps
    assert all(torch.equal(v, given[n]) for n, v in batch.items())
    model.train()
    model(**batch).loss.backward()
    assert steps


@pytest.mark.parametrize("call", [1, 2, 4, 7])
def test_it_is_left_so_after_an_error_midway(call: int) -> None:
    model, batch = _unusual("bart")
    calls: list[int] = []

    def interrupts(module: nn.Module, args: Any, out: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    model.model.encoder.register_forward_hook(interrupts)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        fastvlm.check(model, batch, generate=False)
    assert_as_before(before, state_of(model))


def test_buffers_have_their_values_again() -> None:
    model, batch = bart()
    model.model.encoder.layers[0] = Counter(model.model.encoder.layers[0])
    assert fastvlm.check(model, batch, generate=False).ok
    assert model.model.encoder.layers[0].calls == 0


def test_a_patched_model_is_checked_as_it_is() -> None:
    model, batch = bart()
    fastvlm.patch(model, only=("mlp", "norm"))
    result = fastvlm.check(model, batch, generate=False, train=False)
    assert result.ok
    assert result.patch_report == ""
    assert [m for m in model.modules() if is_patched(m)]


def test_adapters_dropout_and_frozen_parts() -> None:
    peft = pytest.importorskip("peft")
    model, batch = bart()
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "fc1"], lora_dropout=0.5, init_lora_weights=False
    )
    model = peft.get_peft_model(model, config)
    result = fastvlm.check(model, batch, **FEW)
    assert result.ok, str(result)
    trained = sum(p.requires_grad for p in model.parameters())
    assert f"{trained} gradients" in what(result)


@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_gradient_checkpointing(name: str) -> None:
    model = FAMILIES[name].build().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    result = fastvlm.check(model, FAMILIES[name].training(model), generate=False)
    assert result.ok, str(result)
    assert not any("order of sums" in note for note in result.notes)


def test_what_draws_at_random_is_not_compared() -> None:
    model, batch = bart()

    def noise(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out + torch.randn_like(out) if module.training else out

    model.model.encoder.layernorm_embedding.register_forward_hook(noise)
    result = fastvlm.check(model, batch, generate=False)
    left_out = {v.what for v in result.verdicts if v.verdict == "not compared"}
    assert "training loss" in left_out
    assert result.ok


def test_mappings_of_all_kinds_and_settings() -> None:
    model, batch = bart()
    fast = {"generate": False, "train": False}
    assert fastvlm.check(model, UserDict(batch), **fast).ok
    result = fastvlm.check(model, batch, generate={"max_length": 6}, train=False)
    assert {"greedy tokens", "tokens of 3 beams"} < set(what(result))
    alone = fastvlm.check(model, batch, generate={"num_beams": 1, "max_new_tokens": 2}, train=False)
    assert "greedy tokens" in what(alone)
    assert not any("beams" in name for name in what(alone))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = fastvlm.check(model, batch, generate=False)
    assert any("no parameter wants gradients" in note for note in frozen.notes)


def test_the_result_is_also_json() -> None:
    model, batch = bart()
    result = fastvlm.check(model, batch, generate=False, train=False)
    figures = json.loads(json.dumps(result.as_dict()))
    assert figures["ok"] is True
    assert figures["verdicts"][0]["verdict"] == "same"


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        ({"model": 3}, TypeError, ["model", "torch.nn.Module"]),
        ({"model": nn.Linear(2, 2)}, TypeError, ["config", "Linear"]),
        ({"inputs": [1]}, TypeError, ["inputs", "dict", "list"]),
        ({"inputs": {"input_ids": [[1, 2]]}}, ValueError, ["inputs", "tensors"]),
        ({"inputs": {"ids": torch.ones(1, 2)}}, ValueError, ["without fastvlm", "ids"]),
        ({"train": 1}, TypeError, ["train", "True or False"]),
        ({"exact": "yes"}, TypeError, ["exact", "True or False"]),
        ({"generate": 8}, TypeError, ["generate", "dict", "8"]),
        ({"generate": {"do_sample": True}}, ValueError, ["generate", "do_sample"]),
        ({"generate": {"no_such": 1}}, ValueError, ["without fastvlm", "no_such"]),
    ],
)
def test_bad_arguments_are_one_clear_error(
    change: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    model, batch = bart()
    arguments: dict[str, Any] = {"model": model, "inputs": batch, "train": False, **change}
    with pytest.raises(error) as raised:
        fastvlm.check(arguments.pop("model"), arguments.pop("inputs"), **arguments)
    for part in parts:
        assert part in str(raised.value)


def test_inputs_that_it_cannot_take() -> None:
    model, batch = bart()
    for name, value in (("past_key_values", object()), ("groups", torch.zeros(3))):
        with pytest.raises(ValueError, match=name):
            fastvlm.check(model, {**batch, name: value})
    with pytest.raises(ValueError, match="labels"):
        fastvlm.check(model, {**batch, "labels": torch.ones(3)})
    asks = {n: v for n, v in batch.items() if n != "labels"}
    with pytest.raises(ValueError, match="labels or decoder_input_ids"):
        fastvlm.check(model, asks, generate=False)
    meta = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match="meta"):
        fastvlm.check(meta, batch)
    fastvlm.patch(model, weights="int8")
    with pytest.raises(ValueError, match="log_prob_change"):
        fastvlm.check(model, batch)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        fastvlm.check(model, batch)
    with pytest.raises(fastvlm.PatchError):
        fastvlm.check(_Nothing(), {"x": torch.ones(2)})


class _Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = None
        self.linear = nn.Linear(2, 2)
