"""What fine-tuning notebooks do: labels in which padding counts, LoRA on much, layers of others."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from models import EOS, FAMILIES, PAD
from test_loss_without_logits import assert_same, both
from torch import Tensor, nn

import fastvlm


def unmasked(labels: Tensor, pad: int) -> Tensor:
    """As `tokenizer(padding=True).input_ids` has them."""
    return labels.masked_fill(labels == -100, pad)


def told(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = model(**batch).loss
    return loss, [str(one.message) for one in caught if "padding is trained" in str(one.message)]


@pytest.mark.parametrize("name", ["bart", "florence2", "florenz", "t5gemma"])
def test_padding_that_is_trained_on_is_said_once(name: str) -> None:
    """Rows of 7, 3 and 5 labels of 7: 6 of 21 are padding; the loss is transformers' own."""
    plain, ours, batch = both(name)
    assert told(ours, batch)[1] == []
    padded = batch | {"labels": unmasked(batch["labels"], 0 if name == "florenz" else PAD)}
    with torch.no_grad():
        assert told(ours, padded)[1] == []
    assert told(ours.eval(), padded)[1] == []
    loss, words = told(ours.train(), padded)
    assert len(words) == 1
    assert "29% of the labels of this batch are the pad id" in words[0]
    assert torch.allclose(loss, plain(**padded).loss, rtol=1e-5)
    assert told(ours, padded)[1] == []
    assert len(told(copy.deepcopy(ours), padded)[1]) == 1


def test_an_end_token_that_is_the_pad_token_ends_a_row() -> None:
    """The first of them is the end of the text; padding before a text counts whole."""
    ours = FAMILIES["gemma2"].build().train()
    ours.config.pad_token_id = EOS
    fastvlm.patch(ours)
    ids = torch.tensor([[9, 8, 7, EOS, EOS, EOS], [EOS, EOS, 5, 6, 7, EOS], [4, 5, 6, 7, 8, EOS]])
    for rows, share in ((ids[2:], None), (ids[:1], "33%"), (ids[1:2], "33%"), (ids, "22%")):
        one = copy.deepcopy(ours)
        words = told(one, {"input_ids": rows, "labels": rows.clone()})[1]
        assert [share in text for text in words] == [True] * (share is not None)  # type: ignore[operator]


def test_a_pad_id_inside_a_text_is_no_padding() -> None:
    _, ours, batch = both("bart")
    labels = batch["labels"].clone()
    labels[0, 2] = PAD
    assert told(ours, batch | {"labels": labels})[1] == []


def test_lora_as_maestro_sets_it() -> None:
    """Names of which a model has some; fc2 is the tower's as well."""
    peft = pytest.importorskip("peft")
    names = ["q_proj", "o_proj", "k_proj", "v_proj", "linear", "Conv2d", "lm_head", "fc2"]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=names, lora_dropout=0.0, init_lora_weights=False
    )
    models = []
    for patch in (False, True):
        model = FAMILIES["florence2"].build().train()
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config)
        if patch:
            fastvlm.patch(model)
        models.append(model)
    batch = FAMILIES["florence2"].training(models[0])
    losses = []
    for model in models:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.allclose(*losses, rtol=1e-5)
    assert_same(models[1], models[0], 1e-4)
    adapted = {n.split(".lora_")[0].rsplit(".", 1)[1] for n, p in models[1].named_parameters()
               if p.grad is not None}  # fmt: skip
    assert adapted == {"q_proj", "k_proj", "v_proj", "lm_head", "fc2"}


class Linear8bitLt(nn.Linear):
    """As bitsandbytes' by its name and base; its product is another."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.25 * input.mean(-1, keepdim=True)


Linear8bitLt.__module__ = "bitsandbytes.nn.modules"


@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_layers_of_bitsandbytes_are_called_and_left_alone(name: str) -> None:
    plain = FAMILIES[name].build().train()
    kinds = ("q_proj", "v_proj", "fc1", "down_proj")
    theirs = {n for n, m in plain.named_modules() if n.rsplit(".", 1)[-1] in kinds}
    for path in theirs:
        plain.get_submodule(path).__class__ = Linear8bitLt
    ours = copy.deepcopy(plain)
    report = fastvlm.patch(ours)
    assert not theirs & {entry.module for entry in report.patched}
    batch = FAMILIES[name].training(plain)
    for model in (plain, ours):
        model(**batch).loss.backward()
    assert torch.allclose(ours(**batch).loss, plain(**batch).loss, rtol=1e-5)
    assert_same(ours, plain)
