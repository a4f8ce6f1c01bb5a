"""fastvlm.load: Microsoft's layout and the paper's, by tables of names that are written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from published import microsoft_config, paper_config, weights, write, write_safetensors
from torch import Tensor
from transformers import Florence2ForConditionalGeneration

import fastvlm
from fastvlm.florenz import FlorenzForConditionalGeneration

TABLE = "language_model.model.shared.weight"
HEAD = "language_model.lm_head.weight"
CONFIGS = {
    "microsoft": microsoft_config(),
    "paper": paper_config(gemma=False),
    "paper-gemma": paper_config(gemma=True),
}
# a few tensors whose place in our model is told by hand: published -> ours
PLACES = {
    "vision_tower.convs.1.proj.weight": "model.vision_tower.convs.1.conv.weight",
    "vision_tower.blocks.2.1.spatial_block.window_attn.norm.bias": (
        "model.vision_tower.blocks.2.1.spatial_block.norm1.bias"
    ),
    "vision_tower.blocks.2.1.channel_block.channel_attn.fn.qkv.weight": (
        "model.vision_tower.blocks.2.1.channel_block.channel_attn.qkv.weight"
    ),
    "vision_tower.blocks.0.0.channel_block.conv2.fn.dw.bias": (
        "model.vision_tower.blocks.0.0.channel_block.conv2.bias"
    ),
    "vision_tower.blocks.3.0.spatial_block.ffn.fn.net.fc2.weight": (
        "model.vision_tower.blocks.3.0.spatial_block.ffn.fc2.weight"
    ),
    "image_pos_embed.column_embeddings.weight": (
        "model.multi_modal_projector.image_position_embed.column_embeddings.weight"
    ),
    "visual_temporal_embed.pos_idx_to_embed": (
        "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed"
    ),
    "language_model.model.encoder.layers.0.fc1.bias": "{encoder}.layers.0.fc1.bias",
    "language_model.model.decoder.layers.1.encoder_attn.v_proj.weight": (
        "{decoder}.layers.1.encoder_attn.v_proj.weight"
    ),
    HEAD: "lm_head.weight",
}


def load(folder: Path, **kwargs: Any) -> Any:
    return fastvlm.load(folder, **kwargs).model


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_of_the_table_finds_its_place(kind: str, tmp_path: Path) -> None:
    state = weights(CONFIGS[kind])
    loaded = fastvlm.load(write(tmp_path, CONFIGS[kind], state), dtype=torch.float32)
    assert loaded.layout == kind.split("-")[0]
    assert loaded.processor is None
    model = loaded.model
    assert not model.training
    cls = Florence2ForConditionalGeneration if kind == "microsoft" else None
    assert type(model) is (cls or FlorenzForConditionalGeneration)
    ours = model.state_dict()
    halves = "model.language_model." if kind == "microsoft" else "model."
    for theirs, place in PLACES.items():
        name = place.format(encoder=f"{halves}encoder", decoder=f"{halves}decoder")
        assert torch.equal(ours[name], state[theirs]), theirs
    # it is multiplied from the right there
    projection = ours["model.multi_modal_projector.image_projection.weight"]
    assert torch.equal(projection, state["image_projection"].T)
    # all values of the file are in the model, and no others
    held = sum(value.double().sum().item() for value in model.state_dict().values())
    put = sum(value.double().sum().item() for value in state.values())
    assert held == pytest.approx(put, abs=1e-3)
    inner = model.model.language_model if kind == "microsoft" else model.model
    assert model.lm_head.weight is inner.decoder.embed_tokens.weight


def test_settings_of_generate_are_those_of_their_code(tmp_path: Path) -> None:
    model = load(write(tmp_path, CONFIGS["microsoft"]))
    told = model.generation_config
    assert (told.num_beams, told.no_repeat_ngram_size, told.early_stopping) == (3, 3, True)
    assert (told.forced_bos_token_id, told.forced_eos_token_id) == (0, 2)
    assert (told.decoder_start_token_id, told.pad_token_id, told.eos_token_id) == (2, 1, 2)
    (tmp_path / "p").mkdir()
    model = load(write(tmp_path / "p", CONFIGS["paper-gemma"]))
    told = model.generation_config
    assert (told.num_beams, told.decoder_start_token_id, told.pad_token_id) == (3, 1, 0)
    assert told.forced_bos_token_id is None
    assert told.forced_eos_token_id is None
    assert model.config.final_logit_softcapping == 30.0
    assert model.config.decoder.attn_logit_softcapping == 50.0


@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_and_shards_hold_the_same(shards: int, tmp_path: Path) -> None:
    config = CONFIGS["microsoft"]
    want = load(write(tmp_path, config)).state_dict()
    (tmp_path / "pytorch_model.bin").unlink()
    write_safetensors(tmp_path, weights(config), shards)
    have = load(tmp_path).state_dict()
    assert have.keys() == want.keys()
    assert all(torch.equal(have[name], want[name]) for name in want)


def test_a_sharded_bin_holds_the_same(tmp_path: Path) -> None:
    config, state = CONFIGS["microsoft"], weights(CONFIGS["microsoft"])
    want = load(write(tmp_path, config, state)).state_dict()
    (tmp_path / "pytorch_model.bin").unlink()
    places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for file in set(places.values()):
        torch.save({n: v for n, v in state.items() if places[n] == file}, tmp_path / file)
    index = json.dumps({"weight_map": places})
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    have = load(tmp_path).state_dict()
    assert all(torch.equal(have[name], want[name]) for name in want)


@pytest.mark.parametrize(
    "left",
    [
        (TABLE,),
        (HEAD,),
        ("language_model.model.encoder.embed_tokens.weight",),
        ("language_model.model.decoder.embed_tokens.weight",),
    ],
)
def test_what_is_tied_may_be_stored_once_under_any_name(
    left: tuple[str, ...], tmp_path: Path
) -> None:
    config, state = CONFIGS["microsoft"], weights(CONFIGS["microsoft"])
    tied = [name for name in state if name.endswith(("shared.weight", "embed_tokens.weight"))]
    few = {n: v for n, v in state.items() if n not in (*tied, HEAD) or n in left}
    del few["language_model.final_logits_bias"]
    model = load(write(tmp_path, config, few))
    inner = model.model.language_model
    for one in (inner.shared, inner.encoder.embed_tokens, inner.decoder.embed_tokens):
        assert one.weight is model.lm_head.weight
    assert torch.equal(model.lm_head.weight, state[left[0]])


def test_a_head_that_was_trained_apart_stays_apart(tmp_path: Path) -> None:
    state = weights(CONFIGS["microsoft"])
    state[HEAD] = state[HEAD] + 1
    model = load(write(tmp_path, CONFIGS["microsoft"], state))
    assert torch.equal(model.lm_head.weight, state[HEAD])
    shared = model.model.language_model.shared.weight
    assert torch.equal(shared, state[TABLE])
    assert model.model.language_model.encoder.embed_tokens.weight is shared
    ids = torch.tensor([[0, 7, 2]])
    logits = model(input_ids=ids, decoder_input_ids=ids).logits
    fastvlm.patch(model)
    assert torch.allclose(model(input_ids=ids, decoder_input_ids=ids).logits, logits, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, state[HEAD])


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16", torch.float16])
def test_dtype_is_the_asked_one_or_the_configs(dtype: Any, tmp_path: Path) -> None:
    config = {**CONFIGS["microsoft"], "torch_dtype": "float16"}
    model = load(write(tmp_path, config), dtype=dtype)
    want = torch.bfloat16 if dtype == "bfloat16" else torch.float16
    assert {value.dtype for value in model.state_dict().values()} == {want}


def test_without_a_dtype_it_is_the_stored_one(tmp_path: Path) -> None:
    state = {n: v.bfloat16() for n, v in weights(CONFIGS["microsoft"]).items()}
    assert load(write(tmp_path, CONFIGS["microsoft"], state)).dtype == torch.bfloat16


def test_the_model_holds_nothing_of_the_file(tmp_path: Path) -> None:
    model = load(write(tmp_path, CONFIGS["microsoft"]))
    want = {n: v.clone() for n, v in model.state_dict().items()}
    file = tmp_path / "pytorch_model.bin"
    with file.open("r+b") as opened:  # a mapped tensor would change with it
        opened.write(bytes(file.stat().st_size))
    assert all(torch.equal(v, want[n]) for n, v in model.state_dict().items())


def test_options_go_on_to_from_pretrained(tmp_path: Path) -> None:
    model = load(write(tmp_path, CONFIGS["microsoft"]), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="device must be None beside device_map"):
        fastvlm.load(tmp_path, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="dtype must be a float dtype"):
        fastvlm.load(tmp_path, dtype="int8")


def test_the_softcap_is_that_of_their_head(tmp_path: Path) -> None:
    state: dict[str, Tensor] = weights(CONFIGS["paper"])
    model = load(write(tmp_path, CONFIGS["paper"], state))
    ids, start = torch.tensor([[0, 7, 9, 2]]), torch.tensor([[1, 2, 5]])
    model.lm_head.weight.data.mul_(50)
    logits = model(input_ids=ids, decoder_input_ids=start).logits
    hidden = model.model(input_ids=ids, decoder_input_ids=start).last_hidden_state
    want = 30 * torch.tanh(hidden @ model.lm_head.weight.T / 30)
    assert torch.allclose(logits, want, atol=1e-5)
    assert logits.abs().max() > 25


def test_a_processor_from_the_files_that_theirs_reads(tmp_path: Path) -> None:
    write(tmp_path, CONFIGS["microsoft"])
    published.write_processor(tmp_path)
    model, processor = fastvlm.load(tmp_path)
    words = processor.tokenizer
    assert len(words) == published.ROWS
    assert words.convert_tokens_to_ids(["<od>", "<loc_0>", "<and>"]) == [
        published.WORDS, published.WORDS + 4, published.ROWS - 1,
    ]  # fmt: skip
    pixels = torch.zeros(3, 40, 90, dtype=torch.uint8)
    given = processor(text=["<CAPTION>"], images=[pixels], return_tensors="pt")
    assert (given["input_ids"] == model.config.image_token_id).sum() == 1 + 2 * 2
    before = model.generate(**given, max_new_tokens=5)
    fastvlm.patch(model)
    assert torch.equal(model.generate(**given, max_new_tokens=5), before)
    processor.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "processor_config.json").read_text()
    _, larger = fastvlm.load(tmp_path, image_size=96)
    assert larger.num_image_tokens == 10


def test_microsofts_placeholder_has_a_row(tmp_path: Path) -> None:
    """51289 rows: transformers' usual <image> would be the first id beyond them."""
    from fastvlm.loading.configs import image_token

    assert image_token(51_289) == 50_264
    assert image_token(51_328) == 51_289
    assert image_token(published.ROWS) < published.ROWS
