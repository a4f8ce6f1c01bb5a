"""fastvlm.check tells a patched model from one with a silent fault, in each family."""

from __future__ import annotations

from typing import Any

import planted_faults as faults
import pytest
import torch
from models import FAMILIES

import fastvlm

WITHOUT: dict[str, Any] = {"generate": False}
EVALUATION: dict[str, Any] = {"generate": False, "train": False}
GREEDY: dict[str, Any] = {
    "generate": {"num_beams": 1, "max_new_tokens": 3, "min_new_tokens": 3}, "train": False,
}  # fmt: skip
BEAMS: dict[str, Any] = {
    "generate": {"num_beams": 3, "max_new_tokens": 8, "min_new_tokens": 8}, "train": False,
}  # fmt: skip

# fault, families, settings, and what must be different for it
CASES = [
    (faults.padding_is_read, ("florence2", "t5gemma"), EVALUATION, "logits"),
    (faults.scale_is_off, ("mbart", "gemma2"), EVALUATION, "logits"),
    (faults.future_is_seen, ("bart", "florenz"), EVALUATION, "logits"),
    (faults.softcap_is_dropped, ("gemma2", "t5gemma"), EVALUATION, "logits"),
    (faults.window_is_off_by_one, ("gemma2", "florenz"), EVALUATION, "logits"),
    (faults.another_row_of_the_encoder, ("bart", "t5gemma"), EVALUATION, "logits"),
    (
        faults.labels_are_shifted_once_more,
        ("florence2", "paligemma2"),
        WITHOUT,
        "training loss",
    ),
    (faults.head_is_of_yesterday, ("mbart", "gemma2"), WITHOUT, "training loss"),
    (faults.projection_is_of_yesterday, ("paligemma2", "florenz"), EVALUATION, "logits"),
    (faults.mlp_has_no_gradient, ("florence2", "paligemma2"), WITHOUT, "gradients"),
    (faults.steps_are_off, ("bart", "gemma2"), GREEDY, "logits of greedy steps"),
    (faults.beams_are_not_reordered, ("bart", "t5gemma"), BEAMS, "tokens of 3 beams"),
]


@pytest.mark.turns(2)
@pytest.mark.parametrize(
    ("fault", "name", "settings", "what"),
    [
        pytest.param(fault, name, settings, what, id=f"{fault.__name__}-{name}")
        for fault, names, settings, what in CASES
        for name in names
    ],
)
def test_a_silent_fault_is_different(
    fault: faults.Fault,
    name: str,
    settings: dict[str, Any],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = FAMILIES[name].build()
    prompts = settings in (GREEDY, BEAMS)
    batch = (FAMILIES[name].inputs if prompts else FAMILIES[name].training)(model)
    fastvlm.patch(model)
    fault(monkeypatch, model)
    result = fastvlm.check(model, batch, **settings)
    assert not result.ok
    assert result.exit_code == 1
    assert any(what in v.what for v in result.different), str(result)
    assert "DIFFERENT" in str(result)


def test_a_dropped_adapter_is_different() -> None:
    peft = pytest.importorskip("peft")
    for name in ("bart", "gemma2"):
        model = FAMILIES[name].build()
        batch = FAMILIES[name].training(model)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        fastvlm.patch(model)
        assert fastvlm.check(model, batch, **WITHOUT).ok
        layer = next(m for n, m in model.named_modules() if n.endswith("q_proj"))
        faults.planted(layer, lambda own, x, base=layer.base_layer: base(x))
        result = fastvlm.check(model, batch, **WITHOUT)
        assert {"training loss"} < {v.what for v in result.different}


def test_what_fails_with_fastvlm_alone_is_different() -> None:
    model = FAMILIES["bart"].build()
    batch = FAMILIES["bart"].training(model)
    fastvlm.patch(model)

    def fails(own: Any, *args: Any, **kwargs: Any) -> Any:
        raise IndexError("of the patched side")

    faults.planted(model.model.decoder.layers[0], fails)
    result = fastvlm.check(model, batch)
    assert not result.ok
    assert all("IndexError: of the patched side" in v.detail for v in result.different)
    assert not any(torch.is_tensor(v.difference) for v in result.verdicts)
