"""What works beside a patched model: hooks, PEFT, checkpointing, compile, transformers' Trainer."""

from __future__ import annotations

import models
import pytest
import torch
from models import FAMILIES, Family
from torch import Tensor, nn

import fastvlm
from fastvlm.nn.linear import is_plain


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**FAMILIES["bart"].training(model)).logits


def test_a_hook_on_a_layer_norm_goes_on_firing() -> None:
    model = models.bart()
    expected = logits(model)
    fastvlm.patch(model)
    fired = []
    norm = model.model.decoder.layers[0].encoder_attn_layer_norm
    norm.register_forward_hook(lambda *args: fired.append(1))
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert fired == [1]


def test_hooks_on_a_layer_go_on_firing() -> None:
    model = models.bart()
    fastvlm.patch(model)
    fired = []
    fc1 = model.model.decoder.layers[0].fc1
    assert is_plain(fc1)
    handle = fc1.register_forward_hook(lambda *args: fired.append(1))
    assert not is_plain(fc1)
    logits(model)
    assert fired == [1]
    handle.remove()
    assert is_plain(fc1)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_is_called_not_bypassed(when: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "fc1", "lm_head"], init_lora_weights=False
    )

    def build(patch: bool) -> nn.Module:
        model = models.bart()
        if patch and when == "before":
            fastvlm.patch(model)
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config)
        if patch and when == "after":
            fastvlm.patch(model)
        return model.eval()

    plain, ours = build(False), build(True)
    batch = FAMILIES["bart"].training(plain)
    expected, got = plain(**batch), ours(**batch)
    assert torch.allclose(got.logits, expected.logits, atol=1e-4)
    expected.loss.backward()
    got.loss.backward()
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    grads = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert grads.keys() == wanted.keys()
    assert any("lm_head" in name for name in grads)
    for name, grad in wanted.items():
        assert torch.allclose(grads[name], grad, atol=1e-4), name


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_with_dropout(family: Family, reentrant: bool) -> None:
    """Recomputed blocks draw the same dropout and see the same layouts."""
    model = family.build().train()
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.2)
    batch = family.training(model)
    fastvlm.patch(model)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(7)
        model(**batch, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for got, want in zip(gradients(), expected, strict=True):
        assert torch.allclose(got, want, atol=1e-5)


def test_dropout_in_training_mode_is_drawn() -> None:
    model = models.bart(dropout=0.5).train()
    batch = FAMILIES["bart"].training(model)
    fastvlm.patch(model)
    torch.manual_seed(0)
    first, second = model(**batch).loss, model(**batch).loss
    torch.manual_seed(0)
    assert torch.equal(model(**batch).loss, first)
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_torch_compile_of_a_patched_model() -> None:
    model = models.bart()
    batch = FAMILIES["bart"].training(model)
    fastvlm.patch(model)
    expected = logits(model)
    with torch.no_grad():
        got = torch.compile(model, backend="aot_eager")(**batch).logits
    assert torch.allclose(got, expected, atol=1e-4)
