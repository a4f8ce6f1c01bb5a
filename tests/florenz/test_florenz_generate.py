"""generate(): the same tokens with a cache and without, for all ways of decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import Batch, images, prompts
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from fastvlm.florenz import FlorenzForConditionalGeneration

Model = FlorenzForConditionalGeneration

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams-return-all": {"num_beams": 4, "num_return_sequences": 4},
    "sample": {"do_sample": True, "num_return_sequences": 3},
    "early-end": {"num_beams": 3, "min_new_tokens": 0},
}


def generate(model: Model, inputs: Batch, **settings: Any) -> Tensor:
    torch.manual_seed(5)
    defaults = {"max_new_tokens": 12, "min_new_tokens": 12, "no_repeat_ngram_size": 2}
    return model.generate(**inputs, **{**defaults, **settings})


@pytest.mark.parametrize("case", CASES)
def test_the_cache_changes_no_token(model: Model, inputs: Batch, case: str) -> None:
    """Targets outgrow the sliding window (6), and so do the keys that they read."""
    cached = generate(model, inputs, **CASES[case])
    assert torch.equal(cached, generate(model, inputs, use_cache=False, **CASES[case]))
    if case != "early-end":
        assert cached.shape[1] == 13
    assert (cached[:, 0] == 1).all()
    assert len(set(cached.flatten().tolist())) >= 5  # says something


def test_the_cache_holds_what_it_should(model: Model, inputs: Batch) -> None:
    output = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    cache = output.past_key_values
    assert isinstance(cache, EncoderDecoderCache)
    keys = inputs["input_ids"].shape[1]
    for layer in cache.cross_attention_cache.layers:
        assert layer.keys.shape[2] == keys
    assert all(cache.is_updated.values())


def test_encoder_and_tower_run_once(model: Model, inputs: Batch) -> None:
    rows = []
    for part in (model.model.vision_tower.convs[0], model.model.encoder.layers[0]):
        part.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[0]))
    generate(model, inputs, num_beams=3)
    assert rows == [3, 3]


def test_padding_of_the_prompt_changes_no_token(model: Model, inputs: Batch) -> None:
    together = generate(model, inputs)
    for row in range(3):
        length = int(inputs["attention_mask"][row].sum())
        alone = {n: v[row : row + 1] for n, v in inputs.items()}
        alone = {n: v[:, :length] if n != "pixel_values" else v for n, v in alone.items()}
        assert torch.equal(generate(model, alone)[0], together[row])


def test_without_a_mask_every_token_is_read(model: Model, inputs: Batch) -> None:
    """Also 0, which pads targets, but begins prompts."""
    assert (inputs["input_ids"] == 0).any()
    given = {n: v for n, v in inputs.items() if n != "attention_mask"}
    ones = torch.ones_like(inputs["attention_mask"])
    want = generate(model, {**inputs, "attention_mask": ones})
    assert torch.equal(generate(model, given), want)
    assert not torch.equal(want, generate(model, inputs))


def test_a_target_may_be_begun(model: Model, inputs: Batch) -> None:
    begun = torch.tensor([[1, 2, 17], [1, 2, 18], [1, 2, 19]])
    tokens = generate(model, inputs, decoder_input_ids=begun, num_beams=2)
    assert torch.equal(tokens[:, :3], begun)
    plain = generate(model, inputs, decoder_input_ids=begun, num_beams=2, use_cache=False)
    assert torch.equal(tokens, plain)


def test_prompts_may_share_an_image(model: Model) -> None:
    ids, mask = prompts(model, [3, 6, 4])
    image_of = torch.tensor([1, 0, 1])
    shared = {"input_ids": ids, "attention_mask": mask, "pixel_values": images(2)}
    tokens = generate(model, shared, image_of_prompt=image_of, num_beams=2)
    shared["pixel_values"] = images(2)[image_of]
    assert torch.equal(tokens, generate(model, shared, num_beams=2))


def test_embeds_and_encoder_outputs_may_be_given(model: Model, inputs: Batch) -> None:
    want = generate(model, inputs)
    states, features = model.model.encode(**inputs)
    words = model.get_input_embeddings()(inputs["input_ids"][:, features.shape[1] :])
    embeds = torch.cat([features, words], 1)
    mask = {"attention_mask": inputs["attention_mask"]}
    assert torch.equal(generate(model, {"inputs_embeds": embeds, **mask}), want)
    assert torch.equal(generate(model, {"encoder_outputs": states, **mask}), want)


def test_prompt_of_target_is_refused(model: Model, inputs: Batch) -> None:
    with pytest.raises(ValueError, match=r"prompt_of_target must be None in generate\(\)"):
        generate(model, inputs, prompt_of_target=torch.tensor([0, 1, 2]))


def test_several_tokens_on_a_filled_cache(model: Model, inputs: Batch) -> None:
    ids = torch.tensor([[1, 7, 8, 9, 10], [1, 3, 4, 5, 6], [1, 9, 8, 7, 6]])
    want = model(**inputs, decoder_input_ids=ids).logits[:, 3:]
    first = model(**inputs, decoder_input_ids=ids[:, :3], use_cache=True)
    got = model(
        encoder_outputs=(first.encoder_last_hidden_state,),
        attention_mask=inputs["attention_mask"],
        decoder_input_ids=ids[:, 3:],
        past_key_values=first.past_key_values,
    ).logits
    assert torch.allclose(got, want, atol=1e-4)
