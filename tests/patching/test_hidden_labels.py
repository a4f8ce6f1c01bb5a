"""Labels that count in rows which a mask hides: the loss and gradients are transformers' own.

Whoever calls a model without labels may count some of those rows as well, so nothing is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import transformers as tf
from bert_models import BERTS
from gemma3_models import GEMMA3
from llama_models import LLAMAS
from models import FAMILIES
from test_loss_without_logits import Calls, assert_same
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastvlm

Batch = dict[str, Tensor]


def assert_trains_alike(plain: nn.Module, batch: Batch, training: bool = True) -> nn.Module:
    """Loss and gradients, unpatched and patched; gives the patched one."""
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    losses = []
    for model in (plain, ours):
        out = model.train(training)(**batch)
        losses.append(out if isinstance(out, Tensor) else out.loss)
        losses[-1].backward()
    assert torch.allclose(losses[1], losses[0], rtol=1e-5)
    assert_same(ours, plain, 1e-4)
    return ours


def causal_bart(kind: str) -> nn.Module:
    """Its labels are not shifted."""
    torch.manual_seed(0)
    config = getattr(tf, f"{kind}Config")(**{**models._text(), "is_decoder": True})
    config.is_encoder_decoder = False
    return models._spread(getattr(tf, f"{kind}ForCausalLM")(config), 0.15)


def captioner(kind: str) -> tuple[nn.Module, Batch]:
    """A ViT before such a decoder, and labels that count where the decoder's mask is 0."""
    torch.manual_seed(0)
    vision = tf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    text = getattr(tf, f"{kind}Config")(
        **{**models._text(), "is_decoder": True, "add_cross_attention": True}
    )
    text.is_encoder_decoder = False
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id = models.EOS, models.PAD
    model = models._spread(tf.VisionEncoderDecoderModel(config), 0.15)
    labels = models._tokens(3, 9, 5)
    labels[1, 5:] = -100
    mask = (labels != -100).long()
    mask[0, -2:] = 0
    pixels = torch.randn(3, 3, 16, 16)
    return model, {"pixel_values": pixels, "labels": labels, "decoder_attention_mask": mask}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["Bart", "MBart"])
def test_a_model_around_a_decoder_that_has_a_loss_of_its_own(kind: str, training: bool) -> None:
    assert_trains_alike(*captioner(kind), training)


def test_a_model_around_a_decoder_still_runs_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = captioner("Bart")
    batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
    calls = Calls(monkeypatch, "gelu_mlp")
    assert_trains_alike(model, batch)
    assert set(calls.rows["gelu_mlp"]) == {9 + 5 + 9}


@pytest.mark.parametrize("padding", ["left", "right", "right, one label"])
@pytest.mark.parametrize("kind", ["Bart", "MBart"])
def test_labels_that_are_not_shifted(kind: str, padding: str) -> None:
    ids, mask = models._pad(models._tokens(3, 9), [9, 4, 6], left=padding == "left")
    labels = ids.masked_fill(mask == 0, -100)
    if padding != "left":
        labels[1, 4] = 7
    if padding == "right, one label":
        labels[2] = labels[1, :3] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert_trains_alike(causal_bart(kind), batch)


class Own(nn.Module):
    """A trainer's wrapper, which has a loss of its own and hands no labels on."""

    def __init__(self, model: nn.Module, shift: int) -> None:
        super().__init__()
        self.model, self.shift = model, shift

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        logits = self.model(**inputs).logits
        end = logits.shape[1] - self.shift
        return cross_entropy(logits[:, :end].flatten(0, 1), labels[:, self.shift :].flatten())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "paligemma2"])
def test_a_wrapper_with_a_loss_of_its_own(name: str, training: bool) -> None:
    model = FAMILIES[name].build()
    batch = dict(FAMILIES[name].training(model))
    shift = 1 if name == "gemma2" else 0
    if shift:
        batch = dict(FAMILIES[name].inputs(model))  # padded on the left
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    else:
        batch["decoder_input_ids"] = batch["labels"].clamp_min(3)
        mask = batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
        mask[0, -2:] = 0
    assert_trains_alike(Own(model, shift), batch, training)


@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_an_adapter_around_the_model(name: str) -> None:
    import peft

    model = FAMILIES[name].build()
    batch = dict(FAMILIES[name].training(model))
    mask = "attention_mask" if name == "gemma2" else "decoder_attention_mask"
    batch[mask] = (batch["labels"] != -100).long()
    batch[mask][0, -2:] = 0
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    assert_trains_alike(peft.get_peft_model(model, config), batch)


@pytest.mark.parametrize("name", ["bart", "gemma2", "t5gemma", "florenz"])
def test_scores_of_all_rows_without_gradients(name: str) -> None:
    """As perplexity is measured: with a cache, which is not read; then generate() goes on."""
    plain = FAMILIES[name].build()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    batch = dict(FAMILIES[name].inputs(plain))
    if name != "gemma2":
        batch["decoder_input_ids"] = models._tokens(3, 5, 3)
        batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 0], [1] * 5, [0, 1, 1, 1, 1]])
    with torch.no_grad():
        expected, got = (model(**batch).logits for model in (plain, ours))
    assert torch.allclose(got, expected, atol=1e-4)


def _two_ahead(logits: Any, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    """Each row has the label two columns on."""
    ahead = nn.functional.pad(labels, (0, 2), value=-100)[:, 2:]
    return cross_entropy(logits.float().view(-1, vocab_size), ahead.reshape(-1))


def test_a_loss_that_counts_rows_nobody_could_know_of() -> None:
    """One error, where the decoder has left such rows out; the same loss, where it has not."""
    model = FAMILIES["gemma2"].build().train()
    model.loss_function = _two_ahead
    batch = dict(FAMILIES["gemma2"].training(model))
    assert_trains_alike(model, batch)
    ids, mask = models._pad(models._tokens(3, 9), [9, 4, 6], left=True)
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 5] = labels[2, 3] = -100  # the first of a text: no pad predicts the second
    fastvlm.patch(model)
    with pytest.raises(
        ValueError, match="labels must be -100 in rows that the decoder's mask hides"
    ):
        model(input_ids=ids, attention_mask=mask, labels=labels)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_leaves_padding_out(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on from the last column, so the prefill of padded prompts stays ours."""
    model = FAMILIES["gemma2"].build()
    batch = FAMILIES["gemma2"].inputs(model)
    settings = {"max_new_tokens": 3, "num_beams": beams, "do_sample": False}
    expected = model.generate(**batch, **settings)
    fastvlm.patch(model)
    calls: list[Callable[..., Any]] = []
    ours = fastvlm.ops.self_attention
    monkeypatch.setattr(
        fastvlm.ops, "self_attention", lambda *a, **k: (calls.append(ours), ours(*a, **k))[1]
    )
    assert torch.equal(model.generate(**batch, **settings), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gemma3", "mllama", "blip"])
def test_labels_that_the_caller_has_shifted(name: str) -> None:
    """They may count where labels do not, and where the mask hides."""
    family = {**FAMILIES, **models.RELATIVES, **LLAMAS, **GEMMA3, **BERTS}[name]
    plain = family.build()
    batch = family.training(plain)
    labels = batch["labels"]
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:].clamp_min(3)
    assert_trains_alike(plain, {**batch, "shift_labels": shifted})
