"""What changes the tower's numbers and no weight of it, and pixels of another transform."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from towers import batch, frozen
from transformers import CLIPImageProcessor

from fastvlm import VisionFeatures


def _other_activation(model: Any) -> None:
    for module in list(model.model.vision_tower.modules()):
        for name, inner in module._modules.items():
            if "GELU" in type(inner).__name__:
                module._modules[name] = torch.nn.ReLU()


def _other_eps(model: Any) -> None:
    for module in model.model.vision_tower.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1.0


def _adapters(model: Any) -> Any:
    """With a second adapter, both frozen."""
    peft = pytest.importorskip("peft")
    settings = {"target_modules": r".*vision_tower.*fc1", "init_lora_weights": False}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))
    model.add_adapter("second", peft.LoraConfig(r=2, **settings))
    return model.requires_grad_(False)


def _adapters_off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def _other_adapter(model: Any) -> None:
    model.base_model.set_adapter("second", inference_mode=True)


def _other_scaling(model: Any) -> None:
    for module in model.modules():
        if "lora_A" in module._modules:
            module.set_scale("default", 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_other_activation, "GELU.*, here ReLU"),
        (_other_eps, r"eps 1e-0\d+, here LayerNorm, eps 1\.0"),
        (_adapters_off, "adapters .*default.*, here .*adapters off"),
        (_other_adapter, "adapters .*default.*, here .*adapters .*second"),
        (_other_scaling, "'default': 4.0.*, here .*'default': 12.0"),
    ],
)
def test_a_tower_that_computes_otherwise_with_its_weights_is_refused(
    change: Callable[[Any], None], named: str, tmp_path: Path
) -> None:
    plain = frozen()
    pixels = batch(plain)["pixel_values"]
    model = plain if change in (_other_activation, _other_eps) else _adapters(plain)
    model.eval()
    features = VisionFeatures(tmp_path, model, dtype="float32", part="tower")

    @torch.no_grad()
    def run(given: Any) -> torch.Tensor:
        output: torch.Tensor = plain.get_image_features(given).last_hidden_state
        return output

    wanted = run(pixels)
    assert torch.equal(run(features.pixel_values(pixels)), wanted)
    features.flush()
    change(model)
    assert not torch.equal(run(pixels), wanted)
    for given in (features.pixel_values(pixels), features.pixel_values(pixels * 2)):
        with pytest.raises(ValueError, match=f"other structure: .*{named}"):
            run(given)
    with pytest.raises(ValueError, match=f"folder must be .*other structure: .*{named}"):
        VisionFeatures(tmp_path, model)


def test_pixels_of_another_transform_are_not_taken_for_the_picture(tmp_path: Path) -> None:
    """As where caption(features=) opens another folder while a collator has this one."""
    model = frozen().eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))

    def processor(mean: float) -> Any:
        size = {"height": 64, "width": 64}
        return CLIPImageProcessor(size=size, do_center_crop=False, image_mean=[mean] * 3)

    def run(given: Any) -> torch.Tensor:
        output: torch.Tensor = model.get_image_features(given).last_hidden_state
        return output

    first = VisionFeatures(tmp_path / "a", model, processor(0.1), dtype="float32")
    second = VisionFeatures(tmp_path / "b", model, processor(0.9), dtype="float32")
    wanted = {
        one: run(one.image_processor(images=[picture], return_tensors="pt")["pixel_values"])
        for one in (first, second)
    }
    assert not torch.equal(wanted[first], wanted[second])
    for one in (first, second, second):
        assert torch.equal(run(one.pixel_values([picture])), wanted[one])
