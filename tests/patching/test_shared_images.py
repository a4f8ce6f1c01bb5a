"""One image, many targets: the loss and gradients of a batch in which everything is repeated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import FAMILIES, RELATIVES, VOCAB
from test_families import generate
from test_loss_without_logits import Calls, assert_same
from torch import Tensor, nn

import fastvlm

# four prompts on three images, seven targets; in an order that nothing is sorted by
IMAGE_OF_PROMPT = [2, 0, 1, 0]
PROMPT_OF_TARGET = [1, 3, 0, 0, 2, 3, 0]


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    plain = FAMILIES[name].build().train()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    return plain, ours


def shared_batch(name: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    lengths = [4, 7, 2, 5]
    ids = torch.randint(3, VOCAB - 2, (4, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    batch: dict[str, Any] = {"input_ids": ids.where(mask == 1, 1), "attention_mask": mask}
    if name == "florence2":
        image = torch.full((4, 5), VOCAB - 1)
        batch["input_ids"] = torch.cat([image, batch["input_ids"]], 1)
        batch["attention_mask"] = torch.cat([torch.ones_like(image), mask], 1)
        batch["pixel_values"] = torch.randn(3, 3, 64, 64, generator=generator)
        batch["image_of_prompt"] = torch.tensor(IMAGE_OF_PROMPT)
    labels = torch.randint(3, VOCAB - 2, (7, 6), generator=generator)
    beyond = torch.arange(6) >= torch.tensor([6, 1, 4, 2, 6, 3, 5])[:, None]
    batch["labels"] = labels.masked_fill(beyond, -100)
    batch["prompt_of_target"] = torch.tensor(PROMPT_OF_TARGET)
    return batch


def repeated(batch: dict[str, Any]) -> dict[str, Any]:
    """The same batch for a model that knows one prompt and one image for each target."""
    batch = dict(batch)
    prompts = batch.pop("prompt_of_target")
    if "image_of_prompt" in batch:
        batch["pixel_values"] = batch["pixel_values"][batch.pop("image_of_prompt")[prompts]]
    return batch | {name: batch[name][prompts] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name", ["bart", "mbart", "florence2", "t5gemma"])
def test_loss_and_gradients(name: str) -> None:
    plain, ours = pair(name)
    batch = shared_batch(name)
    expected, got = plain(**repeated(batch)), ours(**batch)
    assert torch.allclose(got.loss, expected.loss, rtol=1e-5)
    expected.loss.backward()
    got.loss.backward()
    assert_same(ours, plain, 1e-4)


@pytest.mark.parametrize("name", ["bart", "florence2"])
def test_evaluation_and_the_path_of_transformers(name: str) -> None:
    """Without gradients, with logits for all, and where attention probabilities are asked for."""
    plain, ours = pair(name)
    for model in (plain, ours):
        model.eval().set_attn_implementation("eager")
    batch = shared_batch(name)
    with torch.no_grad():
        expected = plain(**repeated(batch))
        for wish in ({}, {"output_attentions": True}, {"output_hidden_states": True}):
            got = ours(**batch, **wish)
            assert torch.allclose(got.logits, expected.logits, atol=1e-4)
        del batch["labels"]
        batch["decoder_input_ids"] = torch.full((7, 2), 5)
        got = ours(**batch)
        assert torch.allclose(got.logits, plain(**repeated(batch)).logits, atol=1e-4)


def test_everything_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair("florence2")
    batch = shared_batch("florence2")
    images, keys = [], []
    model.model.vision_tower.register_forward_hook(lambda m, args, out: images.append(len(args[0])))
    layer = model.model.language_model.decoder.layers[0].encoder_attn
    project = type(layer.k_proj).forward

    def seen(module: nn.Module, x: Tensor) -> Tensor:
        if module is layer.k_proj:
            keys.append(x.shape[:-1].numel())
        return project(module, x)

    # not by a hook, for which the keys would be projected as transformers does
    monkeypatch.setattr(type(layer.k_proj), "forward", seen)
    calls = Calls(monkeypatch, "gelu_mlp")
    model(**batch)
    prompts = int(batch["attention_mask"].sum())
    assert images == [3]
    assert keys == [prompts]
    targets = int((batch["labels"] != -100).sum())
    assert {prompts, targets} <= set(calls.rows["gelu_mlp"])
    assert len(batch["labels"]) * batch["input_ids"].shape[1] not in calls.rows["gelu_mlp"]


@pytest.mark.parametrize("name", ["florence2", "gemma2"])
def test_losses_of_groups(name: str) -> None:
    """At no extra pass: summed over the tokens of each group, in training and in evaluation."""
    plain, ours = pair(name)
    batch = shared_batch(name) if name == "florence2" else FAMILIES[name].training(plain)
    groups = torch.tensor([2, 0, 0, 4, 2, 2, 1])[: len(batch["labels"])]
    with torch.no_grad():
        logits = plain(**(repeated(batch) if name == "florence2" else batch)).logits
    labels = batch["labels"]
    if name == "gemma2":
        logits, labels = logits[:, :-1], labels[:, 1:]
    nll = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    ).view_as(labels)
    expected = torch.zeros(5).index_add(0, groups, nll.sum(1))
    tokens = torch.zeros(5, dtype=torch.long).index_add(0, groups, (labels != -100).sum(1))
    for model in (ours.train(), ours.eval()):
        out = model(**batch, groups=groups, num_groups=5)
        assert torch.allclose(out.group_losses, expected, rtol=1e-4)
        assert torch.equal(out.group_tokens, tokens)
        assert torch.allclose(out.group_losses.sum() / out.group_tokens.sum(), out.loss)
        assert out["group_losses"] is out.group_losses  # tensors, which wrappers hand on
    out = ours.train()(**batch, groups=groups, num_groups=5)
    out.loss.backward()
    assert not out.group_losses.requires_grad


@pytest.mark.parametrize("wish", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("name", ["florence2", "florenz"])
def test_generate_sees_an_image_once(name: str, wish: dict[str, Any]) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    which = torch.tensor([1, 0, 1])
    pixels = inputs.pop("pixel_values")[:2]
    expected = generate(model, {**inputs, "pixel_values": pixels[which]}, **wish)
    fastvlm.patch(model)
    seen: list[int] = []
    see = model.model.vision_tower.register_forward_pre_hook
    handle = see(lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True)
    got = generate(model, {**inputs, "pixel_values": pixels, "image_of_prompt": which}, **wish)
    handle.remove()
    assert torch.equal(got, expected)
    assert seen == [2]


def test_generate_where_no_image_is_placed() -> None:
    model = FAMILIES["bart"].build()
    inputs = FAMILIES["bart"].inputs(model)
    fastvlm.patch(model)
    with pytest.raises(ValueError, match="image_of_prompt must be left out: the model places no"):
        generate(model, inputs, image_of_prompt=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"not used by the model: \['image_of_promt'\]"):
        generate(model, inputs, image_of_promt=torch.tensor([0, 1, 2]))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "floats": ({"prompt_of_target": torch.zeros(7)}, r"prompt_of_target must be an int64"),
    "list": ({"prompt_of_target": PROMPT_OF_TARGET}, r"prompt_of_target must be an int64"),
    "targets": ({"prompt_of_target": torch.zeros(6).long()}, r"prompt_of_target .* 7 rows"),
    "prompts": ({"image_of_prompt": torch.zeros(3).long()}, r"image_of_prompt .* 4 rows"),
    "groups": ({"groups": torch.zeros(2).long(), "num_groups": 3}, r"groups must .* 7 rows"),
    "number": ({"groups": torch.zeros(7).long()}, r"num_groups must be a whole number"),
    "alone": ({"groups": torch.zeros(7).long(), "num_groups": 1, "labels": None}, r"groups must"),
    "pixels": ({"pixel_values": None}, r"image_of_prompt must be given together with"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    _, model = pair("florence2")
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        model(**{**shared_batch("florence2"), **change})


def test_indices_out_of_range() -> None:
    _, model = pair("bart")
    batch = shared_batch("bart")
    batch["prompt_of_target"] = torch.tensor([0, 1, 2, 4, 0, 0, 0])
    with pytest.raises(ValueError, match=r"image_of must be in \[0, 4\)"):
        model(**batch)


def test_models_that_cannot() -> None:
    _, model = pair("gemma2")
    batch = FAMILIES["gemma2"].training(model)
    with pytest.raises(ValueError, match="prompt_of_target must be left out: the model has no enc"):
        model(**batch, prompt_of_target=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="image_of_prompt must be left out: the model places no"):
        model(**batch, image_of_prompt=torch.tensor([0, 1, 2]))


def test_groups_beside_an_adapter_on_the_head_are_refused() -> None:
    _, model = pair("bart")
    model.lm_head.register_forward_hook(lambda m, args, out: out)
    batch: dict[str, Tensor] = shared_batch("bart")
    with pytest.raises(ValueError, match="groups must be left out where the head is no plain"):
        model(**batch, groups=torch.zeros(7).long(), num_groups=1)


def test_a_model_that_hands_its_decoder_nothing() -> None:
    """VisionEncoderDecoder gives such arguments to its encoder, which forgets them."""
    plain: Any = RELATIVES["vit_gpt2"].build()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    pixels = RELATIVES["vit_gpt2"].inputs(plain)["pixel_values"]
    labels = torch.randint(3, VOCAB - 2, (3, 5), generator=torch.Generator().manual_seed(3))
    reads = torch.tensor([2, 0, 0])
    want = plain(pixel_values=pixels[reads], labels=labels).loss
    got = ours(pixel_values=pixels, labels=labels, prompt_of_target=reads).loss
    other = plain(pixel_values=pixels, labels=labels).loss
    assert torch.allclose(got, want, rtol=1e-5)
    assert not torch.allclose(other, want, rtol=1e-3)
    want.backward()
    got.backward()
    assert_same(ours, plain, 1e-4)
