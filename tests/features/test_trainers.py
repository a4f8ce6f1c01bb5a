"""PackingCollator, an unchanged Trainer of transformers, and the page of docs/ about it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import torch
from test_folder import picture, processor
from test_readme import ROOT, SNIPPET
from torch.utils.data import default_collate
from towers import batch, frozen, refuse_to_run, same, step
from transformers import Trainer, TrainingArguments

import fastvlm
from fastvlm import VisionFeatures
from fastvlm.packing import PackingCollator, expand

IDS = {"image_token_id": 98, "num_image_tokens": 5, "pad_token_id": 1, "decoder_start_token_id": 2}
IDS["decoder_pad_token_id"] = 1


class Counted:
    """An image processor that notes how many pictures it was given."""

    def __init__(self) -> None:
        self.inner, self.seen = processor(), 0

    def __call__(self, images: list[Any], **settings: Any) -> Any:
        self.seen += len(images)
        return self.inner(images=images, **settings)

    def to_dict(self) -> Any:
        return self.inner.to_dict()


def packed(image: Any, number: int) -> dict[str, Any]:
    targets = [{"prompt_ids": [5, 6], "label_ids": [7 + number, 8, 2]} for _ in range(2)]
    return {"image": image, "image_id": number, "targets": targets}


def test_packed_batches(tmp_path: Path) -> None:
    """Pictures, arrays and pixel_values; what is kept goes through no image processor."""
    model = frozen()
    fastvlm.patch(model)
    turned = picture(2)
    turned.getexif()[0x0112] = 6
    pictures = [picture(), picture(1).convert("L"), np.array(picture(3)), picture(4).convert("P")]
    samples = [packed(one, i) for i, one in enumerate([*pictures, turned])]
    samples.append({**packed(None, 9), "pixel_values": torch.ones(3, 64, 64)})
    wanted = step(model, PackingCollator(image_processor=processor(), **IDS)(samples))
    counted = Counted()
    features = VisionFeatures(tmp_path, model, counted, dtype="float32")
    collate = PackingCollator(vision_features=features, **IDS)
    assert same(step(model, collate(samples)), wanted)
    assert counted.seen == 5
    assert len(features) == 6
    refuse_to_run(model)
    read = collate(samples[::-1])
    assert counted.seen == 5
    assert torch.allclose(step(model, read)[0], wanted[0])
    with pytest.raises(ValueError, match="batch must be made without vision_features"):
        expand(read)
    with pytest.raises(ValueError, match="image_processor must be that of vision_features"):
        PackingCollator(
            vision_features=features, image_processor=processor(do_rescale=False), **IDS
        )


def test_the_key_of_a_picture_is_all_that_a_transform_may_look_at(tmp_path: Path) -> None:
    features = VisionFeatures(tmp_path, frozen(), processor())
    turned, clear = picture(), picture().convert("P")
    turned.getexif()[0x0112] = 6
    clear.info["transparency"] = 3
    other = picture().convert("P")
    other.putpalette([7] * 768)
    array = np.array(picture())
    different = [
        picture(), picture(1), picture().convert("L"), picture().convert("P"), picture().rotate(90),
        picture().resize((128, 512)), turned, clear, other, array, array.astype(np.float32),
        array.reshape(128, 512, 3), torch.ones(3, 8, 8), torch.ones(3, 4, 16),
        torch.ones(3, 8, 8).bfloat16(),
    ]  # fmt: skip
    keys = [features.key(one) for one in different]
    assert len(set(keys)) == len(keys)
    assert keys == [features.key(one) for one in different]
    assert features.key(array) == features.key(array[:, ::-1][:, ::-1])
    with pytest.raises(ValueError, match="an image must be"):
        features.key("photo.jpg")


@pytest.mark.slow
def test_an_unchanged_trainer(tmp_path: Path) -> None:
    """Two epochs, each in an order of its own; the losses are those of a run that keeps nothing."""
    given = batch(frozen())
    rows = [{name: value[i] for name, value in given.items()} for i in range(3)] * 2

    def losses(keep: bool) -> list[float]:
        model = frozen()
        fastvlm.patch(model)
        collate: Any = default_collate
        if keep:
            collate = VisionFeatures(tmp_path / "kept", model, dtype="float32").collator(collate)
        settings = TrainingArguments(
            str(tmp_path / "run"), num_train_epochs=2, per_device_train_batch_size=2,
            learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, dataloader_num_workers=int(keep),
        )  # fmt: skip
        trainer = Trainer(model, settings, collate, rows)  # type: ignore[arg-type]
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    wanted = losses(keep=False)
    assert wanted[-1] < wanted[0]
    assert losses(keep=True) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.turns(3)
def test_the_page_about_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its snippet runs, on a tiny checkpoint in Microsoft's layout, and keeps what it says."""
    text = (ROOT / "docs" / "training" / "index.md").read_text()
    snippet = next(one for one in SNIPPET.findall(text) if "VisionFeatures" in one)
    config = published.microsoft_config(max_position_embeddings=200)
    (tmp_path / "microsoft").mkdir()
    published.write(tmp_path / "microsoft/Florence-2-base", config, published.weights(config))
    published.write_processor(tmp_path / "microsoft/Florence-2-base")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "fastvlm": fastvlm, "samples": [(picture(i), "a b" * i) for i in range(3)],
        "arguments": TrainingArguments("run", num_train_epochs=2, report_to=[], use_cpu=True,
                                       disable_tqdm=True, save_strategy="no"),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(snippet, "docs/training/index.md", "exec"), names)
    assert len(names["features"]) == 3
