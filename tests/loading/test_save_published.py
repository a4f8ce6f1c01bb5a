"""fastvlm.save_published: back into the layouts that the published code reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from published import microsoft_config, paper_config, table, weights, write
from safetensors.torch import load_file
from torch import nn

import fastvlm

CONFIGS = {
    "microsoft": microsoft_config(),
    "paper": paper_config(gemma=False),
    "paper-gemma": paper_config(gemma=True),
}
HEAD = "language_model.lm_head.weight"


@pytest.mark.parametrize("kind", CONFIGS)
def test_there_and_back_is_the_same(kind: str, tmp_path: Path) -> None:
    config, state = CONFIGS[kind], weights(CONFIGS[kind])
    model = fastvlm.load(write(tmp_path, config, state)).model
    fastvlm.patch(model)
    out = tmp_path / "out"
    fastvlm.save_published(model, out)
    stored, shapes = load_file(out / "model.safetensors"), table(config)
    # what their code ties when it loads may be left out
    left = {HEAD} if kind != "microsoft" else {
        "language_model.model.encoder.embed_tokens.weight",
        "language_model.model.decoder.embed_tokens.weight",
    }  # fmt: skip
    assert set(stored) == set(shapes) - left
    for name, value in stored.items():
        assert list(value.shape) == shapes[name], name
        assert torch.equal(value, state[name]), name
    said = json.loads((out / "config.json").read_text())
    for part in ("vision_config", "text_config"):
        for name, value in config[part].items():
            if name not in ("model_type", "normalize_before", "gemma_config"):
                assert said[part][name] == value, name
    for name, value in config["text_config"].get("gemma_config", {}).items():
        assert said["text_config"]["gemma_config"][name] == value, name
    assert said["vision_config"]["model_type"] == "davit"
    if kind == "paper-gemma":  # transformers 4.48 chooses sdpa otherwise, without the softcap
        assert said["text_config"]["gemma_config"]["_attn_implementation"] == "eager"
    again = fastvlm.load(out).model
    want = model.state_dict()
    assert all(torch.equal(v, want[n]) for n, v in again.state_dict().items())
    assert again.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()


def test_shards_processor_and_tokenizer_go_along(tmp_path: Path) -> None:
    write(tmp_path, CONFIGS["paper"])
    published.write_processor(tmp_path)
    model, processor = fastvlm.load(tmp_path)
    out = tmp_path / "out"
    words = processor.tokenizer
    fastvlm.save_published(model, out, processor=processor, tokenizer=words, max_shard_size=40_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    again = fastvlm.load(out)
    assert len(again.tokenizer) == len(words)
    asked = "What does w3 show?"
    assert again.processor.tokenizer(asked).input_ids == words(asked).input_ids
    assert again.processor.num_image_tokens == processor.num_image_tokens
    want = model.state_dict()
    assert all(torch.equal(v, want[n]) for n, v in again.model.state_dict().items())


def test_what_their_code_has_no_place_for_is_refused(tmp_path: Path) -> None:
    model = fastvlm.load(write(tmp_path, CONFIGS["paper"])).model
    with pytest.raises(ValueError, match="folder must be a folder without weights"):
        fastvlm.save_published(model, tmp_path)
    with pytest.raises(ValueError, match="model must be a Florence2ForConditionalGeneration or"):
        fastvlm.save_published(nn.Linear(1, 1), tmp_path / "out")

    def refused(part: str, **changes: Any) -> None:
        for name, value in changes.items():
            place = getattr(model.config, part) if part else model.config
            before = getattr(place, name)
            setattr(place, name, value)
            with pytest.raises(ValueError, match=rf"config\.{part}\.?{name} must be"):
                fastvlm.save_published(model, tmp_path / "out")
            setattr(place, name, before)

    refused("", final_logit_softcapping=20.0)
    refused("vision_config", qkv_bias=False, mlp_ratio=2.0)
    refused("decoder", dropout=0.5, scale_embedding=True)
    model.model.encoder.layers[0].extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no others; not so: model.encoder.layers.0.extra"):
        fastvlm.save_published(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
