"""Padding that something reads all the same: then it must be what transformers computes there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from exact import Float64
from models import EOS, FAMILIES, PAD
from test_families import generate
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import fastvlm
from fastvlm.decoding.prefixes import decoder_stack
from fastvlm.run import layouts

SEQ2SEQ = ["bart", "mbart", "florence2", "t5gemma", "florenz"]
WISHES: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}]
IDS = ["greedy", "beams", "no-cache"]


def ids_alone(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": FAMILIES["t5gemma"].inputs(model)["input_ids"]}


@pytest.mark.parametrize("wish", WISHES, ids=IDS)
def test_pads_in_the_prompt_and_no_mask(wish: dict[str, Any]) -> None:
    """T5Gemma's encoder takes pads for padding, its cross-attention does not."""
    model = FAMILIES["t5gemma"].build()
    expected = generate(model, ids_alone(model), **wish)
    fastvlm.patch(model)
    assert torch.equal(generate(model, ids_alone(model), **wish), expected)


@pytest.mark.parametrize("trains", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("hole", [-100, PAD], ids=["ignored", "pad"])
def test_losses_over_pads_and_no_mask(trains: bool, hole: int) -> None:
    """Pads in the prompt, and in the middle of the labels, before one that counts."""
    model = FAMILIES["t5gemma"].build().train(trains)
    batch = FAMILIES["t5gemma"].training(model)
    batches = []
    for _ in range(8):  # a single number of PyTorch's may be right by luck
        labels = torch.where(batch["labels"] == -100, -100, torch.randint(3, 90, (3, 7)))
        labels[0, 2] = labels[2, 1] = hole
        batches.append({"input_ids": batch["input_ids"], "labels": labels})

    def losses(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.stack([model(**batch).loss.double() for batch in batches])

    with Float64():
        exact = losses(FAMILIES["t5gemma"].build().double().train(trains))
    plain = losses(model)
    fastvlm.patch(model)
    ours = losses(model)
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed


@pytest.mark.parametrize("wish", WISHES, ids=IDS)
@pytest.mark.parametrize("name", [*SEQ2SEQ, "gemma2"])
def test_a_prefix_padded_on_the_right(name: str, wish: dict[str, Any]) -> None:
    """generate() goes on from the last column, whatever the mask says of it."""
    model = FAMILIES[name].build()
    inputs = dict(FAMILIES[name].inputs(model))
    if name == "gemma2":
        inputs = dict(FAMILIES[name].training(model))
        del inputs["labels"]
    else:
        inputs["decoder_input_ids"] = torch.tensor([[2, 7, 8, 9], [2, 10, 11, 12], [2, 13, 14, 15]])
        inputs["decoder_attention_mask"] = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    expected = generate(model, inputs, **wish)
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, **wish), expected)


@pytest.mark.parametrize("wish", WISHES, ids=IDS)
def test_pads_that_are_generated(wish: dict[str, Any]) -> None:
    """Without a cache T5Gemma's decoder takes them for padding, and reads on from there."""
    model = FAMILIES["t5gemma"].build()
    inputs = FAMILIES["t5gemma"].inputs(model)

    def run() -> Tensor:
        ends = {"forced_bos_token_id": PAD, "min_new_tokens": 12, "max_new_tokens": 12}
        return model.generate(**inputs, **ends, no_repeat_ngram_size=2, **wish)

    expected = run()
    assert (expected[:, 1] == PAD).all()
    assert (expected[:, 2:] != EOS).any()
    fastvlm.patch(model)
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_states_without_the_mask_they_were_made_with(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros, which no mask hides any more: said once, and not where a mask or no padding is."""
    monkeypatch.setattr(layouts, "_warned", False)
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    fastvlm.patch(model)
    ids, mask = inputs["input_ids"].clamp_max(90), inputs["attention_mask"]
    with torch.no_grad():
        states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, {"encoder_outputs": BaseModelOutput(states), "attention_mask": mask})
        generate(model, {"encoder_outputs": BaseModelOutput(states[:1])})
    with pytest.warns(UserWarning, match="pass the attention_mask"):
        generate(model, {"encoder_outputs": BaseModelOutput(states)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, {"encoder_outputs": BaseModelOutput(states)})


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_row_whose_prompt_is_all_padding(name: str) -> None:
    """It reads nothing, as in transformers' sdpa; their eager attention reads all of it."""
    model = FAMILIES[name].build()
    inputs = dict(FAMILIES[name].inputs(model))
    inputs["attention_mask"] = inputs["attention_mask"] * torch.tensor([[1], [0], [1]])
    expected = generate(model, inputs)
    fastvlm.patch(model)
    got = generate(model, inputs)
    eager = decoder_stack(model).config._attn_implementation == "eager"
    same = [0, 2] if eager else [0, 1, 2]
    assert torch.equal(got[same], expected[same])
    inputs["input_ids"][1, -4:] = torch.tensor([20, 30, 40, 50])
    assert torch.equal(generate(model, inputs), got)


@pytest.mark.parametrize("wish", [*WISHES, {"do_sample": True, "num_return_sequences": 3}], ids=str)
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_images_of_different_token_counts(name: str, wish: dict[str, Any]) -> None:
    """Masks with nothing, with a middle and with a front left out; one copy of what is left."""
    model = FAMILIES[name].build()
    inputs = dict(FAMILIES[name].inputs(model))
    mask = inputs["attention_mask"] = inputs["attention_mask"].clone()
    mask[1, 1:3] = mask[2, :2] = 0
    assert len({*mask.sum(1).tolist()}) == 3
    expected = generate(model, inputs, **wish)
    fastvlm.patch(model)
    got = generate(model, inputs, **wish, return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected)
    if got.past_key_values is not None and wish.get("use_cache") is not False:
        layer = got.past_key_values.cross_attention_cache.layers[0]
        assert layer.packed[0].shape[0] == int(mask.sum())
