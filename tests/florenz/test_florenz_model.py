"""The whole model: loss, padding, readers that share, precision, checkpointing, files, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import IMAGE_TOKENS, VOCAB, Batch, batch, build, gradients, images, prompts, targets
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from fastvlm.florenz import FlorenzForConditionalGeneration

Model = FlorenzForConditionalGeneration


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    # the scale of the rounding is that of the sums, not of what cancels in them
    total = torch.stack([g.abs().max() for g in theirs.values()]).max()
    for name, want in theirs.items():
        assert (ours[name] - want).abs().max() <= 1e-5 * total, name


def test_loss_is_the_mean_over_shifted_labels(model: Model, inputs: Batch) -> None:
    labels = targets([7, 3, 5])
    output = model(**inputs, labels=labels)
    start = torch.full((3, 1), 1)
    given = torch.cat([start, labels[:, :-1]], 1).masked_fill(
        torch.cat([start, labels[:, :-1]], 1) == -100, 0
    )
    logits = model(**inputs, decoder_input_ids=given, use_cache=False).logits
    assert torch.equal(logits, output.logits)
    assert logits.shape == (3, 7, VOCAB)
    assert logits.abs().max() < 30
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    want = -chosen[labels != -100]
    assert close(output.loss, want.mean())
    shared = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(40)).loss
    assert close(shared, want.sum() / 40)


def test_logits_are_capped(model: Model, inputs: Batch) -> None:
    capped = model(**inputs, labels=targets([7, 3, 5])).logits
    model.config.final_logit_softcapping = None
    raw = model(**inputs, labels=targets([7, 3, 5])).logits
    assert close(30 * torch.tanh(raw / 30), capped)
    assert not close(raw, capped)


def test_logits_to_keep(model: Model, inputs: Batch) -> None:
    ids = targets([7, 7, 7])
    everything = model(**inputs, decoder_input_ids=ids).logits
    last = model(**inputs, decoder_input_ids=ids, logits_to_keep=2).logits
    assert last.shape[1] == 2
    assert close(last, everything[:, -2:])


def test_encoder_padding_changes_nothing(model: Model, inputs: Batch) -> None:
    """Row 1 alone, without its padding, gives what it gives in the padded batch."""
    labels = targets([7, 3, 5])
    together = model(**inputs, labels=labels).logits[1]
    length = int(inputs["attention_mask"][1].sum())
    assert length < inputs["input_ids"].shape[1]
    row = {name: value[1:2] for name, value in inputs.items()}
    row = {n: v[:, :length] if n != "pixel_values" else v for n, v in row.items()}
    assert close(model(**row, labels=labels[1:2]).logits[0], together)
    # and the words do count
    changed = row["input_ids"].clone()
    changed[0, -1] = 3 + (changed[0, -1] + 1) % 70
    other = model(**{**row, "input_ids": changed}, labels=labels[1:2]).logits[0]
    assert not close(other, together, 1e-3)


def test_right_padding_of_targets_needs_no_mask(model: Model, inputs: Batch) -> None:
    labels = targets([7, 3, 5])
    mask = (labels != -100).long()
    plain = model(**inputs, labels=labels)
    masked = model(**inputs, labels=labels, decoder_attention_mask=mask)
    assert close(masked.loss, plain.loss)
    assert close(masked.logits[mask == 1], plain.logits[mask == 1])


def test_image_tokens_stand_where_the_placeholders_are(model: Model, inputs: Batch) -> None:
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert features.shape == (3, IMAGE_TOKENS, model.config.encoder.d_model)
    states, returned = model.model.encode(**inputs)
    assert torch.equal(features, returned)
    words = model.get_input_embeddings()(inputs["input_ids"][:, IMAGE_TOKENS:])
    embeds = torch.cat([features, words], 1)
    direct = model(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        decoder_input_ids=targets([4, 4, 4]),
    )
    assert close(direct.encoder_last_hidden_state, states.last_hidden_state)
    assert close(direct.logits, model(**inputs, decoder_input_ids=targets([4, 4, 4])).logits)


def test_a_shared_image_batch_equals_the_expanded_one(model: Model) -> None:
    """Two images, three prompts, five targets, in no order: loss and gradients."""
    ids, mask = prompts(model, [3, 6, 4])
    pixels, labels = images(2), targets([7, 3, 5, 2, 6])
    image_of, prompt_of = torch.tensor([1, 0, 1]), torch.tensor([2, 0, 1, 2, 2])
    model.train()
    loss, grads = gradients(
        model,
        input_ids=ids,
        attention_mask=mask,
        pixel_values=pixels,
        labels=labels,
        image_of_prompt=image_of,
        prompt_of_target=prompt_of,
    )
    want, theirs = gradients(
        model,
        input_ids=ids[prompt_of],
        attention_mask=mask[prompt_of],
        pixel_values=pixels[image_of][prompt_of],
        labels=labels,
    )
    assert close(loss, want)
    assert_same_gradients(grads, theirs)
    # another map is another loss
    other = model(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=pixels,
        labels=labels,
        image_of_prompt=image_of.flip(0) * 0,
        prompt_of_target=prompt_of,
    ).loss
    assert not close(other, want, 1e-3)


def test_the_vision_tower_and_the_encoder_run_once_per_image_and_prompt(model: Model) -> None:
    rows = []
    for part in (model.model.vision_tower.convs[0], model.model.encoder.layers[0]):
        part.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[0]))
    ids, mask = prompts(model, [3, 6, 4])
    model(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=images(2),
        labels=targets([7, 3, 5, 2, 6]),
        image_of_prompt=torch.tensor([1, 0, 1]),
        prompt_of_target=torch.tensor([2, 0, 1, 2, 2]),
    )
    assert rows == [2, 3]


def test_encoder_outputs_of_an_earlier_call(model: Model, inputs: Batch) -> None:
    labels = targets([7, 3, 5])
    want = model(**inputs, labels=labels)
    states = want.encoder_last_hidden_state
    for given in (BaseModelOutput(states), (states,)):
        again = model(encoder_outputs=given, attention_mask=inputs["attention_mask"], labels=labels)
        assert torch.equal(again.loss, want.loss)
    one = model(
        encoder_outputs=BaseModelOutput(states),
        attention_mask=inputs["attention_mask"],
        labels=labels[[1, 1]],
        prompt_of_target=torch.tensor([1, 1]),
    )
    assert close(one.logits[0], want.logits[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(model: Model, inputs: Batch, dtype: torch.dtype) -> None:
    labels = targets([7, 3, 5])
    want = model(**inputs, labels=labels).loss
    model.to(dtype)
    loss, grads = gradients(
        model, **{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}, labels=labels
    )
    assert (loss - want).abs() <= 32 * torch.finfo(dtype).eps * want.abs()
    assert all(g.isfinite().all() and g.dtype == dtype for g in grads.values())


def test_eager_and_sdpa_agree(model: Model, inputs: Batch) -> None:
    labels = targets([7, 3, 5])
    losses = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config.encoder._attn_implementation == name
        losses[name] = model(**inputs, labels=labels).loss
    assert close(losses["sdpa"], losses["eager"])
    if model.config.has_gemma_decoder:
        # sdpa has no softcap
        assert model.config.decoder._attn_implementation == "eager"


def test_sdpa_can_be_asked_for_at_the_start() -> None:
    for size in ("0.4B", "3.5B"):
        built = build(size, attn_implementation="sdpa")
        assert built.config.encoder._attn_implementation == "sdpa"
        wanted = "eager" if built.config.has_gemma_decoder else "sdpa"
        assert built.config.decoder._attn_implementation == wanted


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(
    model: Model, inputs: Batch, reentrant: bool
) -> None:
    labels = targets([7, 3, 5])
    model.train()
    want, theirs = gradients(model, **inputs, labels=labels)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ran = []
    layer = model.model.decoder.layers[0]
    inside = layer.mlp if model.config.has_gemma_decoder else layer.fc1
    inside.register_forward_hook(lambda *_: ran.append(1))
    loss, grads = gradients(model, **inputs, labels=labels)
    assert len(ran) == 2  # forward, and again in backward
    assert close(loss, want)
    # the vision tower is not checkpointed, and reentrant blocks do not lose the encoder
    assert_same_gradients(grads, theirs)


def test_attentions_and_hidden_states_on_request(model: Model, inputs: Batch) -> None:
    model.set_attn_implementation("eager")
    output = model(
        **inputs,
        labels=targets([7, 3, 5]),
        output_attentions=True,
        output_hidden_states=True,
    )
    keys = inputs["input_ids"].shape[1]
    heads = model.config.decoder.num_attention_heads
    assert [tuple(a.shape) for a in output.cross_attentions] == [(3, heads, 7, keys)] * 2
    assert [tuple(a.shape) for a in output.decoder_attentions] == [(3, heads, 7, 7)] * 2
    assert len(output.decoder_hidden_states) == len(output.encoder_hidden_states) == 3
    hidden = inputs["attention_mask"][:, None, None] == 0
    for probs in output.cross_attentions:
        assert (probs.masked_select(hidden.expand_as(probs)) == 0).all()


def test_as_tuple(model: Model, inputs: Batch) -> None:
    labels = targets([7, 3, 5])
    loss, logits = model(**inputs, labels=labels, return_dict=False)[:2]
    want = model(**inputs, labels=labels)
    assert torch.equal(loss, want.loss)
    assert torch.equal(logits, want.logits)


def test_files_keep_the_model(model: Model, inputs: Batch, tmp_path: Path) -> None:
    want = model(**inputs, labels=targets([7, 3, 5])).logits
    model.save_pretrained(tmp_path)
    again, report = Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert again.lm_head.weight is again.model.decoder.embed_tokens.weight
    assert torch.equal(again(**inputs, labels=targets([7, 3, 5])).logits, want)
    assert again.generation_config.decoder_start_token_id == 1
    assert type(again.config) is type(model.config)
    for part in ("encoder", "decoder", "vision_config"):
        ours, theirs = (getattr(m.config, part).to_dict() for m in (again, model))
        assert ours | {"dtype": None} == theirs | {"dtype": None}


@pytest.mark.filterwarnings("ignore:.*no longer tied")
def test_a_merged_adapter_is_saved_with_its_head(model: Model, tmp_path: Path) -> None:
    """PEFT compares the head with the table of the prompts, and calls it untied."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    merged = peft.get_peft_model(model, config).merge_and_unload()
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = FlorenzForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, merged.lm_head.weight)


def test_a_file_without_gates_gives_closed_ones(tmp_path: Path) -> None:
    model = build("3.5B")
    kept = {n: p for n, p in model.state_dict().items() if "gate" not in n or "gate_proj" in n}
    assert len(kept) == len(model.state_dict()) - 2
    model.save_pretrained(tmp_path, state_dict=kept)
    again, report = Model.from_pretrained(tmp_path, output_loading_info=True)
    assert len(report["missing_keys"]) == 2
    for layer in again.model.decoder.layers:
        assert layer.encoder_attn_gate.tolist() == [0.0]


def test_the_head_is_the_embedding(model: Model) -> None:
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert model.get_output_embeddings() is model.lm_head
    names = [n for n, _ in model.named_parameters()]
    assert "lm_head.weight" not in names


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({"input_ids": None}, "exactly one of input_ids and inputs_embeds.*got neither"),
    "both": ({"inputs_embeds": torch.zeros(3, 9, 32)}, "exactly one of input_ids.*got both"),
    "embeds-and-pixels": (
        {"input_ids": None, "inputs_embeds": torch.zeros(3, 9, 32)},
        "pixel_values must be None with inputs_embeds",
    ),
    "no-pixels": ({"pixel_values": None}, "pixel_values must be given where input_ids have images"),
    "no-placeholders": (
        {"input_ids": torch.full((3, 11), 5)},
        r"input_ids must be with 5 times image_token_id \(89\) in each row; got \[0, 0, 0\]",
    ),
    "fewer-images": (
        {"pixel_values": images(2)},
        "image_of_prompt must be given where 3 prompts read 2 images; got None",
    ),
    "image-out-of-range": (
        {"pixel_values": images(2), "image_of_prompt": torch.tensor([0, 2, 1])},
        r"image_of_prompt must be int64 of shape \[3\] with values in \[0, 2\); got \[0, 2, 1\]",
    ),
    "image-negative": (
        {"image_of_prompt": torch.tensor([0, -1, 1])},
        r"image_of_prompt must be int64 of shape \[3\] with values in \[0, 3\); got \[0, -1, 1\]",
    ),
    "image-length": (
        {"image_of_prompt": torch.tensor([0, 1])},
        r"image_of_prompt must be int64 of shape \[3\].*got a int64 tensor of shape \[2\]",
    ),
    "image-dtype": (
        {"image_of_prompt": torch.tensor([0, 1, 2], dtype=torch.int32)},
        "image_of_prompt must be int64",
    ),
    "image-list": ({"image_of_prompt": [0, 1, 2]}, "image_of_prompt must be int64"),
    "more-targets": (
        {"labels": targets([3, 4])},
        "prompt_of_target must be given where 2 targets read 3 prompts; got None",
    ),
    "many-targets": (
        {"labels": targets([3, 4, 5, 6, 7, 8])},
        "prompt_of_target must be given where 6 targets read 3 prompts; got None",
    ),
    "target-out-of-range": (
        {"labels": targets([3, 4]), "prompt_of_target": torch.tensor([3, 0])},
        r"prompt_of_target must be int64 of shape \[2\] with values in \[0, 3\); got \[3, 0\]",
    ),
    "target-length": (
        {"prompt_of_target": torch.tensor([0, 1])},
        r"prompt_of_target must be int64 of shape \[3\]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_refusals_name_the_argument(case: str) -> None:
    model = build("3.5B")
    changed, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        model(**{**batch(model), "labels": targets([7, 3, 5]), **changed})


def test_an_image_of_prompt_without_images(model: Model) -> None:
    with pytest.raises(ValueError, match="image_of_prompt must be None without pixel_values"):
        model(input_ids=torch.full((1, 4), 5), image_of_prompt=torch.tensor([0]))


def test_prompts_without_images(model: Model) -> None:
    """Text alone, as a translation model reads it, is allowed."""
    output = model(input_ids=torch.full((2, 4), 5), labels=targets([3, 3]))
    assert output.loss.isfinite()
    assert output.image_hidden_states is None


def test_decoder_arguments(model: Model, inputs: Batch) -> None:
    embeds = torch.zeros(3, 2, model.config.decoder.hidden_size)
    with pytest.raises(ValueError, match=r"exactly one of.*decoder_inputs_embeds"):
        model(**inputs, decoder_input_ids=targets([2, 2, 2]), decoder_inputs_embeds=embeds)
    with pytest.raises(NotImplementedError, match="vocabularies of their own"):
        model.resize_token_embeddings(100)
