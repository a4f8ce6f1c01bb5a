"""What fastvlm.load refuses: one clear error each, naming what was wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from published import microsoft_config, paper_config, weights, write, write_safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastvlm
from fastvlm.__main__ import main

CONFIG = microsoft_config()
QKV = "vision_tower.blocks.0.0.spatial_block.window_attn.fn.qkv.weight"
TABLE = "language_model.model.shared.weight"
HEAD = "language_model.lm_head.weight"
BIN, SAFE = "pytorch_model.bin", "model.safetensors"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def state(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    made = weights(CONFIG)
    change(made)
    return made


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown(folder: Path) -> None:
    told = {"model_type": "mine", "auto_map": {"AutoModel": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(told))
    # it would say so if it ran
    (folder / "mine.py").write_text("raise SystemExit('code of a checkpoint')")


def no_weights(folder: Path) -> None:
    (folder / BIN).unlink()


def cut_bin(folder: Path) -> None:
    data = (folder / BIN).read_bytes()
    (folder / BIN).write_bytes(data[: len(data) // 2])


def cut_safetensors(folder: Path) -> None:
    write_safetensors(folder, weights(CONFIG), 1)
    data = (folder / SAFE).read_bytes()
    (folder / SAFE).write_bytes(data[: len(data) // 2])


def no_tensor_file(folder: Path) -> None:
    (folder / BIN).write_bytes(b"<html>not found</html>")


def pointer(folder: Path) -> None:
    (folder / BIN).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")


def a_shard_less(folder: Path) -> None:
    write_safetensors(folder, weights(CONFIG), 3)
    (folder / "model-1.safetensors").unlink()


def a_shard_outside(folder: Path) -> None:
    index = {"weight_map": {"a": "../other.safetensors"}}
    (folder / f"{SAFE}.index.json").write_text(json.dumps(index))


def an_index_that_says_too_much(folder: Path) -> None:
    write_safetensors(folder, weights(CONFIG), 2)
    index = json.loads((folder / f"{SAFE}.index.json").read_text())
    index["weight_map"]["more"] = "model-1.safetensors"
    (folder / f"{SAFE}.index.json").write_text(json.dumps(index))


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("it-ran"),))


def code(folder: Path) -> None:
    torch.save({**weights(CONFIG), "more": Evil()}, folder / BIN)


def more_than_tensors(folder: Path) -> None:
    torch.save({"state_dict": weights(CONFIG), "epoch": 3}, folder / BIN)


def a_list(folder: Path) -> None:
    torch.save([torch.ones(2)], folder / BIN)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (no_config, ["config.json must lie in it", BIN]),
        (no_json, ["config.json", "must be JSON"]),
        (unknown, ["model_type 'mine'", "trust_remote_code=True only"]),
        (no_weights, [SAFE, BIN, "none does"]),
        (cut_bin, [BIN, "cut off"]),
        (cut_safetensors, [SAFE, "cut off"]),
        (no_tensor_file, [BIN, "cut off"]),
        (pointer, [BIN, "Git LFS pointer"]),
        (a_shard_less, ["model-1.safetensors must lie in it", "index.json"]),
        (a_shard_outside, ["names of shards must be plain", "../other.safetensors"]),
        (an_index_that_says_too_much, ["its shards must hold", "more"]),
        (code, [BIN, "must hold tensors only", "weights_only=True"]),
        (more_than_tensors, [BIN, "'state_dict' is a dict"]),
        (a_list, [BIN, "dict of names and tensors", "got list"]),
    ],
)
def test_a_folder_that_is_not_whole(
    spoil: Callable[[Path], None],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil(write(tmp_path, CONFIG))
    with pytest.raises(fastvlm.LoadError) as caught:
        fastvlm.load(tmp_path)
    for part in ("fastvlm.load: ", str(tmp_path), *parts):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    ("made", "parts"),
    [
        (state(lambda s: s.pop(QKV)), ["tensors missing (1): ", f"{QKV} [24, 8]"]),
        (
            state(lambda s: [s.pop(n) for n in list(s) if "decoder.layers" in n]),
            ["tensors missing (", "decoder.layers.0", "more"],
        ),
        (
            state(lambda s: s.update({"a.b": torch.ones(2)})),
            ["tensors without a place in the model (1): ", "a.b"],
        ),
        (
            state(lambda s: s.update({QKV: torch.ones(24, 9)})),
            ["tensors of another shape (1): ", f"{QKV} must be [24, 8], is [24, 9]"],
        ),
        (
            state(lambda s: s.update({"image_projection": s["image_projection"].T.contiguous()})),
            ["image_projection must be [24, 16], is [16, 24]"],
        ),
        (
            state(lambda s: s["language_model.final_logits_bias"].fill_(0.5)),
            ["final_logits_bias must be zero"],
        ),
        (
            state(lambda s: s.update({n: s[n] + 1 for n in s if "encoder.embed_tok" in n})),
            ["encoder.embed_tokens.weight must equal", TABLE],
        ),
    ],
)
def test_tensors_that_do_not_fit(made: dict[str, Tensor], parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(fastvlm.LoadError) as caught:
        fastvlm.load(write(tmp_path, CONFIG, made))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"vision_config": None}, ["must be of a type"]),
        ({"text_config": 3}, ["config.json must have text_config, an object; got 3"]),
        ({"vision_config": {"dim_embed": [8]}}, ["vision_config must have depths"]),
        (
            {"vision_config": {**CONFIG["vision_config"], "image_feature_source": ["last_frame"]}},
            ["image_feature_source must be", "last_frame"],
        ),
        (
            {"vision_config": {**CONFIG["vision_config"], "model_type": "vit"}},
            ["vision_config.model_type must be 'davit'; got 'vit'"],
        ),
        ({"text_config": {**CONFIG["text_config"], "d_model": "x"}}, ["does not fit together"]),
        (
            {"text_config": {**CONFIG["text_config"], "use_encoder_tokenizer": False}},
            ["use_encoder_tokenizer must be true"],
        ),
    ],
)
def test_a_config_of_another_model(
    change: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    write(tmp_path, {**CONFIG, "architectures": ["Florence"], **change}, weights(CONFIG))
    with pytest.raises(fastvlm.LoadError) as caught:
        fastvlm.load(tmp_path)
    for part in parts:
        assert part in str(caught.value)


def test_a_head_that_the_papers_code_would_drop(tmp_path: Path) -> None:
    config = paper_config(gemma=True)
    made = weights(config)
    made[HEAD] = made[HEAD] + 1
    with pytest.raises(fastvlm.LoadError, match="as tie_word_embeddings is true"):
        fastvlm.load(write(tmp_path, config, made))
    config["tie_word_embeddings"] = False
    model = fastvlm.load(write(tmp_path, config, made)).model
    assert torch.equal(model.lm_head.weight, made[HEAD])
    del made[HEAD]
    with pytest.raises(fastvlm.LoadError, match="as tie_word_embeddings is false"):
        fastvlm.load(write(tmp_path, config, made))
    config["tie_word_embeddings"] = True
    config["text_config"]["gemma_config"]["encoder_attn_every_x_layers"] = 2
    with pytest.raises(fastvlm.LoadError, match="encoder_attn_every_x_layers must be 1; got 2"):
        fastvlm.load(write(tmp_path, config, made))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("/nowhere/at/all", "must be a folder, or a model's id"),
        ("a/b/c", "must be a folder, or a model's id"),
        ("owner/there-is-no-such-model", "or a model's id that can be fetched"),
    ],
)
def test_no_such_place(given: str, part: str) -> None:
    with pytest.raises(fastvlm.LoadError, match=part):
        fastvlm.load(given)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    write(tmp_path, CONFIG)
    with pytest.raises(fastvlm.LoadError, match="it is a file"):
        fastvlm.load(tmp_path / BIN)


def test_transformers_own_layout_is_as_strict(tmp_path: Path) -> None:
    model = fastvlm.load(write(tmp_path / "theirs", CONFIG)).model
    model.save_pretrained(tmp_path / "own")
    assert fastvlm.load(tmp_path / "own").layout == "transformers"
    whole = dict(model.state_dict())
    whole.pop("model.vision_tower.convs.0.conv.weight")
    model.save_pretrained(tmp_path / "less", state_dict=whole)
    with pytest.raises(fastvlm.LoadError, match=r"missing \(1\): model.vision_tower.convs.0.conv"):
        fastvlm.load(tmp_path / "less")
    more = {**model.state_dict(), "extra.weight": torch.ones(2)}
    model.save_pretrained(tmp_path / "more", state_dict=more)
    with pytest.raises(fastvlm.LoadError, match=r"without a place in the model \(1\): extra"):
        fastvlm.load(tmp_path / "more")


def test_a_captioner_without_the_pooler_of_its_encoder(tmp_path: Path) -> None:
    """As TrOCR's checkpoints come; anything else that is missing is an error."""
    vision = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8,
    )  # fmt: skip
    text = tf.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True,
        is_decoder=True,
    )  # fmt: skip
    model: Any = tf.VisionEncoderDecoderModel(
        encoder=tf.ViTModel(vision, add_pooling_layer=False), decoder=tf.GPT2LMHeadModel(text)
    )
    model.save_pretrained(tmp_path)
    loaded = fastvlm.load(tmp_path).model
    assert type(loaded) is tf.VisionEncoderDecoderModel
    pixels, ids = torch.randn(1, 3, 16, 16), torch.tensor([[3, 4]])
    with torch.no_grad():
        given = {"pixel_values": pixels, "decoder_input_ids": ids}
        assert torch.equal(loaded(**given).logits, model.eval()(**given).logits)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["decoder.transformer.h.0.ln_1.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fastvlm.LoadError, match=r"tensors missing \(1\): decoder.transformer.h.0"):
        fastvlm.load(tmp_path)


def test_a_commit_of_the_hub_from_its_cache(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--owner--name"
    (place / "snapshots").mkdir(parents=True)
    write(place / "snapshots" / commit, CONFIG)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    loaded = fastvlm.load("owner/name", cache_dir=tmp_path, local_files_only=True)
    assert (loaded.layout, loaded.commit, loaded.id) == ("microsoft", commit, "owner/name")


@pytest.mark.parametrize("command", ["caption", "demo", "check"])
def test_on_the_command_line_it_is_one_line(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cut_bin(write(tmp_path, CONFIG))
    out = ["--out", str(tmp_path)] if command == "demo" else []
    assert main([command, "--model", str(tmp_path), *out]) == 2
    err = capfd.readouterr().err
    assert f"fastvlm {command}: --model wants" in err
    assert "is cut off" in err
    assert len(err.splitlines()) == 1
