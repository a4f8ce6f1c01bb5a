"""PackingCollator: what goes in comes out, once; and everything it refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from records import GROUPS, WordTokenizer, flat, image, read_back, records, samples
from transformers.models.bart.modeling_bart import shift_tokens_right

from fastvlm import Layout
from fastvlm.packing import PackingCollator, TargetBalancer, expand, find_groups


def collator(**settings: Any) -> PackingCollator:
    return PackingCollator(**{"groups": GROUPS, "pad_token_id": 1, **settings})


@settings(deadline=None)
@given(
    count=st.integers(1, 8),
    seed=st.integers(0, 1000),
    side=st.sampled_from(["left", "right"]),
    multiple=st.sampled_from([None, 1, 8]),
)
def test_a_batch_holds_exactly_its_records(
    count: int, seed: int, side: str, multiple: int | None
) -> None:
    given_samples = samples(count, seed)
    batch = collator(padding_side=side, pad_to_multiple_of=multiple)(given_samples)
    assert read_back(batch) == records(given_samples)
    assert batch["pixel_values"].shape == (count, 3, 2, 2)
    if multiple:
        assert batch["input_ids"].shape[1] % multiple == batch["labels"].shape[1] % multiple == 0


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_flat_records_in_any_order_make_the_same_targets(seed: int) -> None:
    given_samples = samples(4, seed)
    scattered = flat(given_samples)
    torch.manual_seed(seed)
    scattered = [scattered[i] for i in torch.randperm(len(scattered))]
    batch = collator()(scattered)
    assert read_back(batch) == records(given_samples)
    assert len(batch["pixel_values"]) == 4


def test_each_image_and_each_distinct_prompt_once_in_image_order() -> None:
    batch = collator()(samples(6, seed=1))
    for name in ("image_of_prompt", "prompt_of_target"):
        index = batch[name]
        assert index.dtype == torch.int64
        assert (index.diff() >= 0).all()
        assert index.unique().tolist() == list(range(int(index.max()) + 1))
    prompts = [
        (int(picture), tuple(row.tolist()))
        for picture, row in zip(batch["image_of_prompt"], batch["input_ids"])
    ]
    assert len(set(prompts)) == len(prompts)
    # the layouts that a model makes of it need no reordering
    encoder = batch["attention_mask"].sum(1)
    decoder = (batch["labels"] != -100).sum(1)
    layout = Layout.from_lengths(decoder, encoder, batch["prompt_of_target"])
    assert layout.rows_by_image is None


def test_equal_prompts_of_two_images_are_two_rows() -> None:
    target = {"prompt_ids": [4, 5], "label_ids": [7]}
    batch = PackingCollator(pad_token_id=1)(
        [{"pixel_values": image(n), "targets": [target, target]} for n in range(2)]
    )
    assert batch["input_ids"].tolist() == [[4, 5], [4, 5]]
    assert batch["image_of_prompt"].tolist() == [0, 1]
    assert batch["prompt_of_target"].tolist() == [0, 0, 1, 1]


def test_without_an_id_the_object_is_the_identity() -> None:
    shared, same_values = image(3), image(3)
    batch = PackingCollator(pad_token_id=1)(
        [
            {"pixel_values": pixels, "input_ids": [4], "labels": [labels]}
            for labels, pixels in enumerate([shared, same_values, shared], start=10)
        ]
    )
    assert batch["pixel_values"].shape[0] == 2
    assert batch["labels"].tolist() == [[10], [12], [11]]


def test_text_goes_through_the_tokenizers_and_ids_do_not() -> None:
    class Other(WordTokenizer):
        pad_token_id, eos_token_id = 0, 9

    batch = PackingCollator(
        tokenizer=WordTokenizer(), decoder_tokenizer=Other(), decoder_start_token_id=9
    )(
        [
            {"pixel_values": image(0), "prompt": "w1 w2", "text": "w3"},
            {"pixel_values": image(1), "input_ids": torch.tensor([5]), "labels": [6, 7, 8]},
        ]
    )
    assert batch["input_ids"].tolist() == [[11, 12, 2], [5, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[13, 9, -100], [6, 7, 8]]
    assert batch["decoder_input_ids"].tolist() == [[9, 13, 9], [9, 6, 7]]


def test_decoder_inputs_are_what_a_model_of_transformers_makes_of_the_labels() -> None:
    batch = collator(decoder_start_token_id=2, decoder_pad_token_id=1)(samples(5, seed=3))
    wanted = shift_tokens_right(batch["labels"], 1, 2)
    assert torch.equal(batch["decoder_input_ids"], wanted)


def test_an_end_token_survives_the_cut_and_another_last_token_does_not() -> None:
    cut = collator(
        max_prompt_tokens=3, max_target_tokens=2, prompt_end_token_id=2, target_end_token_id=8
    )
    sample = {"pixel_values": image(0), "task": "caption", "language": "de"}
    ended = cut([{**sample, "input_ids": [4, 5, 6, 2], "labels": [7, 7, 7, 8]}])
    assert (ended["input_ids"].tolist(), ended["labels"].tolist()) == ([[4, 5, 2]], [[7, 8]])
    unended = cut([{**sample, "input_ids": [4, 5, 6, 3], "labels": [7, 7, 7, 9]}])
    assert (unended["input_ids"].tolist(), unended["labels"].tolist()) == ([[4, 5, 6]], [[7, 7]])


@pytest.mark.parametrize("prompt", [[4, 5, 6], [50, 50, 50, 4, 5, 6]], ids=["without", "with"])
def test_image_tokens_stand_in_front_once(prompt: list[int]) -> None:
    florence = collator(image_token_id=50, num_image_tokens=3, max_prompt_tokens=2)
    sample = {"pixel_values": image(0), "image_id": "a", "task": "caption", "language": "de"}
    batch = florence([{**sample, "input_ids": prompt, "labels": [7]}])
    assert batch["input_ids"].tolist() == [[50, 50, 50, 4, 5]]
    assert florence.lengths({**sample, "input_ids": prompt, "labels": [7]}) == (1, 5, 1)


def test_an_image_processor_sees_each_image_once() -> None:
    seen: list[Any] = []

    def processor(images: list[int], return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        seen.extend(images)
        return {"pixel_values": torch.stack([image(n) for n in images])}

    target = {"prompt_ids": [4], "label_ids": [7]}
    batch = PackingCollator(pad_token_id=1, image_processor=processor)(
        [
            {"image": 5, "image_id": "a", "targets": [target]},
            {"pixel_values": image(6), "image_id": "b", "targets": [target]},
            {"image": 5, "image_id": "a", "targets": [{**target, "label_ids": [8]}]},
        ]
    )
    assert seen == [5]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [5, 6]


def test_groups_are_indices_into_the_names() -> None:
    given_samples = samples(6, seed=2)
    batch = collator(groups=reversed(GROUPS))(given_samples)
    mirrored = collator()(given_samples)
    assert torch.equal(batch["groups"], len(GROUPS) - 1 - mirrored["groups"])
    assert batch["num_groups"] == len(GROUPS)
    nameless = PackingCollator(pad_token_id=1)
    assert nameless.group_names == [(None, None)]
    assert nameless(given_samples)["groups"].unique().tolist() == [0]


def test_groups_found_do_not_hang_on_the_order_of_samples() -> None:
    given_samples = samples(20, seed=4)
    unnamed = {"pixel_values": image(0), "input_ids": [4], "labels": [5], "task": "caption"}
    wanted = [("caption", None), *GROUPS]
    assert find_groups([*given_samples, unnamed]) == wanted
    assert find_groups([unnamed, *reversed(given_samples)]) == wanted


def test_lists_within_the_list_are_joined() -> None:
    given_samples = samples(5, seed=5)
    nested = collator()([given_samples[:2], given_samples[2:]])
    assert read_back(nested) == records(given_samples)


def test_prepared_samples_are_taken_as_they_are() -> None:
    given_samples = samples(5, seed=6)
    pack = collator(max_target_tokens=3)
    prepared = [pickle.loads(pickle.dumps(pack.prepare(sample))) for sample in given_samples]
    once, twice = pack(given_samples), pack(prepared)
    assert once.keys() == twice.keys()
    assert all(torch.equal(torch.as_tensor(once[k]), torch.as_tensor(twice[k])) for k in once)


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_lengths_are_those_of_the_batch(seed: int) -> None:
    pack = collator(max_target_tokens=4, image_token_id=50, num_image_tokens=3)
    for sample in samples(3, seed):
        batch = pack([sample])
        tokens = int((batch["labels"] != -100).sum()), int(batch["attention_mask"].sum())
        assert pack.lengths(sample) == (*tokens, 1)


def test_at_most_so_many_targets_of_an_image() -> None:
    given_samples = samples(8, seed=7)
    first = collator(max_targets_per_image=2)(given_samples)
    wanted = [{**sample, "targets": sample["targets"][:2]} for sample in given_samples]
    assert read_back(first) == records(wanted)
    chosen = collator(max_targets_per_image=2, balance=TargetBalancer(GROUPS))(given_samples)
    assert read_back(chosen) <= records(given_samples)
    assert chosen["labels"].shape[0] == first["labels"].shape[0]


def test_expand_repeats_image_and_prompt_for_each_target() -> None:
    given_samples = samples(4, seed=8)
    batch = collator(decoder_start_token_id=2, decoder_pad_token_id=1)(given_samples)
    rows = expand(batch)
    assert {len(tensor) for tensor in rows.values()} == {len(flat(given_samples))}
    alone = {
        **rows,
        "image_of_prompt": torch.arange(len(rows["labels"])),
        "prompt_of_target": torch.arange(len(rows["labels"])),
        "groups": batch["groups"],
    }
    assert read_back(alone) == records(given_samples)
    assert torch.equal(rows["decoder_input_ids"], batch["decoder_input_ids"])


GOOD = {"pixel_values": image(0), "input_ids": [4], "labels": [5], "task": "caption"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pad_token_id": None}, "pad_token_id must be given"),
        ({"decoder_start_token_id": 2}, "decoder_pad_token_id must be given"),
        ({"image_token_id": 5}, "image_token_id and num_image_tokens must be given together"),
        ({"max_target_tokens": 0}, "max_target_tokens must be a whole number, 1 or more"),
        ({"pad_to_multiple_of": 8.0}, r"pad_to_multiple_of .* got 8.0 \(float\)"),
        ({"padding_side": "middle"}, "padding_side must be one of 'right', 'left'"),
        ({"groups": []}, "groups must be distinct"),
        ({"groups": [("a", "b"), ("a", "b")]}, "groups must be distinct"),
        ({"balance": TargetBalancer(GROUPS)}, "max_targets_per_image must be given with balance"),
    ],
)
def test_refused_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"fastvlm.packing.PackingCollator: {message}"):
        collator(**settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": None}, "given 'pixel_values' or 'image'"),
        ({"labels": None}, "given one of 'label_ids', 'labels', 'text'"),
        ({"input_ids": [[1, 2]]}, "the prompt of a target must be a string or a 1-D sequence"),
        ({"labels": [1.5]}, "the labels of a target must be a string or a 1-D sequence"),
        ({"labels": []}, "the labels of a target must be at least one token"),
        ({"labels": "text"}, "decoder_tokenizer must be given"),
        ({"image_id": [1]}, "image_id must be hashable"),
        ({"targets": []}, "targets must be at least one"),
        ({"targets": {"prompt": "a"}}, "targets must be a list of mappings"),
        ({"language": "xx"}, r"groups must be to hold \('caption', 'xx'\)"),
        ({"pixel_values": torch.ones(2, 2)}, r"pixel_values must be \[3, H, W\]"),
        ({"pixel_values": None, "image": 1}, "image_processor must be given"),
        ({"input_ids": [50]}, "the prompt of a target must be without image tokens"),
        ({"input_ids": [4, 50, 50]}, "the prompt of a target must be without image tokens"),
    ],
)
def test_refused_samples(changes: dict[str, Any], message: str) -> None:
    pack = collator(image_token_id=50, num_image_tokens=2)
    good = {**GOOD, "language": "de"}
    assert pack([good])["labels"].tolist() == [[5]]
    with pytest.raises(ValueError, match=message):
        pack([{**good, **changes}])


def test_images_of_two_shapes_are_refused_and_so_is_nothing() -> None:
    other = {**GOOD, "language": "de", "pixel_values": torch.ones(3, 4, 4)}
    with pytest.raises(ValueError, match="of one shape"):
        collator()([{**GOOD, "language": "de"}, other])
    with pytest.raises(ValueError, match="samples must be at least one"):
        collator()([])


def test_copies_are_independent() -> None:
    pack = collator(max_targets_per_image=1, balance=TargetBalancer(GROUPS))
    other = copy.deepcopy(pack)
    pack(samples(9))
    assert pack.balance is not None
    assert other.balance is not None
    assert sum(pack.balance.counts.values()) == 9
    assert sum(other.balance.counts.values()) == 0


def test_with_an_id_other_objects_are_the_same_image_and_the_first_is_taken() -> None:
    record = {"image_id": "a", "input_ids": [4], "labels": [5]}
    pixels = [image(0), image(1)]
    batch = PackingCollator(pad_token_id=1)([{**record, "pixel_values": one} for one in pixels])
    assert torch.equal(batch["pixel_values"], pixels[0][None])
