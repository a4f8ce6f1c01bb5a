"""Captions with features kept: caption(), Captioner and the command, again without the tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import fill, keys, lines, noise, run, texts
from towers import refuse_to_run

import fastvlm
from fastvlm import Captioner, VisionFeatures
from fastvlm.captioning import models


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    made = models.random(True, "cpu")
    fastvlm.patch(made.model)
    return made


def test_caption(loaded: models.Loaded, tmp_path: Path) -> None:
    pictures = [noise(0), noise(1), noise(0)]

    def captions(images: Any, **settings: Any) -> list[Any]:
        found = fastvlm.caption(
            loaded.model, loaded.processor, images, ["en", "de"], max_new_tokens=5, **settings
        )
        return [(one.image, one.language, one.tokens) for one in found]

    wanted = captions(pictures)
    features = VisionFeatures(
        tmp_path / "kept", loaded.model, loaded.processor.image_processor, dtype="float32"
    )
    assert captions(pictures, features=features) == wanted
    features.flush()
    assert len(features) == 2
    hook = refuse_to_run(loaded.model)
    assert captions(iter(pictures), batch_size=2, features=tmp_path / "kept") == wanted
    hook.remove()
    features.detach()
    assert captions(pictures) == wanted


def test_captioner(loaded: models.Loaded, tmp_path: Path) -> None:
    """Pictures that are kept and those that are not never share a batch."""

    def answers(seeds: range, **settings: Any) -> list[str]:
        one = Captioner(loaded.model, loaded.processor, num_beams=2, max_new_tokens=5, **settings)
        with one:
            futures = [one.submit(noise(seed)) for seed in seeds]
            return [future.result()[0].text for future in futures]

    wanted = answers(range(4))
    features = VisionFeatures(
        tmp_path, loaded.model, loaded.processor.image_processor, dtype="float32"
    )
    assert answers(range(2), features=features, linger=0.2) == wanted[:2]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1  # closing writes
    assert answers(range(4), features=features, linger=0.2) == wanted
    hook = refuse_to_run(loaded.model)
    assert answers(range(4), features=features) == wanted
    hook.remove()
    features.detach()


@pytest.mark.slow
def test_the_command_for_another_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, kept = fill(tmp_path / "photos", 3), str(tmp_path / "kept")
    real = models.random

    def seen_before(*given: Any) -> models.Loaded:
        made = real(*given)
        refuse_to_run(made.model)
        return made

    assert run(photos, tmp_path / "a.jsonl") == 0
    assert run(photos, tmp_path / "b.jsonl", "--features", kept) == 0
    monkeypatch.setattr(models, "random", seen_before)
    assert run(photos, tmp_path / "c.jsonl", "--features", kept) == 0
    assert run(photos, tmp_path / "d.jsonl", "--features", kept, "--task", "<OD>") == 0
    assert keys(tmp_path / "c.jsonl") == keys(tmp_path / "a.jsonl")
    assert texts(tmp_path / "c.jsonl") == texts(tmp_path / "b.jsonl")
    assert [line.get("error") for line in lines(tmp_path / "d.jsonl")] == [None] * 3

    def other(*given: Any) -> models.Loaded:
        made = real(*given)
        with torch.no_grad():
            next(made.model.model.vision_tower.parameters()).mul_(2)
        return made

    monkeypatch.setattr(models, "random", other)
    assert run(photos, tmp_path / "e.jsonl", "--features", kept) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("fastvlm caption: --features wants one of this tower and transform")
    assert "other weights: vision_tower.convs.0" in told
