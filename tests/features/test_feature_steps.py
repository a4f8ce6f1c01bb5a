"""A step with kept features is the step without them, and what would not be is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from towers import batch, frozen, refuse_to_run, same, step

import fastvlm
from fastvlm import VisionFeatures


def kept(features: VisionFeatures, given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "pixel_values": features.pixel_values(given["pixel_values"])}


@pytest.mark.turns(3)
@pytest.mark.parametrize(
    ("family", "part", "patched"),
    [
        ("florence2", "tower", True),
        ("florence2", "projector", False),
        ("florenz", "projector", True),
        ("paligemma2", "tower", False),
        ("paligemma2", "projector", True),
    ],
)
def test_losses_and_gradients_are_those_of_a_step_without(
    family: str, part: str, patched: bool, tmp_path: Path
) -> None:
    model = frozen(family, projector=part == "projector")
    if patched:
        fastvlm.patch(model)
    given = batch(model, family)
    wanted = step(model, given)
    assert any("multi_modal" in name for name in wanted[1]) == (part == "tower")
    features = VisionFeatures(tmp_path, model, dtype="float32")
    assert features.part == part
    assert same(step(model, given), wanted), "pixels themselves go on working"
    assert same(step(model, kept(features, given)), wanted), "the first time"
    features.flush()
    refuse_to_run(model)
    assert same(step(model, kept(features, given)), wanted), "read"
    again = VisionFeatures(tmp_path, model)
    assert (again.dtype, again.part, len(again)) == ("float32", part, 3)
    assert same(step(model, kept(again, given)), wanted), "of another run"
    if patched:
        fastvlm.patch(model)
        assert same(step(model, kept(again, given)), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_features_of_16_bits_are_the_towers_output_rounded(dtype: str, tmp_path: Path) -> None:
    model = frozen()
    given = batch(model)

    def rounded(module: Any, inputs: Any, output: Any) -> Any:
        kind = getattr(torch, dtype)
        output.last_hidden_state = output.last_hidden_state.to(kind).float()
        return output

    hook = model.model.vision_tower.register_forward_hook(rounded)
    wanted = step(model, given)
    hook.remove()
    assert not same(step(model, given), wanted)
    chosen = None if dtype == "bfloat16" else dtype
    features = VisionFeatures(tmp_path, model, dtype=chosen)
    for _ in range(2):  # from the first step on
        assert same(step(model, kept(features, given)), wanted)
        features.flush()


def test_generate_and_evaluation(tmp_path: Path) -> None:
    model = frozen().eval()
    fastvlm.patch(model)
    given = batch(model)
    labels = given.pop("labels")
    wanted = model.generate(**given, num_beams=3, max_new_tokens=8)
    features = VisionFeatures(tmp_path, model, dtype="float32")
    for _ in range(2):
        read = kept(features, given)
        assert torch.equal(model.generate(**read, num_beams=3, max_new_tokens=8), wanted)
    with torch.no_grad():
        loss = model(**read, labels=labels).loss
        assert torch.equal(loss, model(**given, labels=labels).loss)


def test_images_that_come_twice_and_several_in_a_sample(tmp_path: Path) -> None:
    """Two images in each row; the second of row 0 is the first of row 2."""
    model = frozen()
    given = batch(model)
    pixels = torch.randn(6, 3, 64, 64)
    pixels[4] = pixels[1]
    places = given["input_ids"][:, :5]
    ones = torch.ones_like(places)
    given |= {
        "pixel_values": pixels,
        "input_ids": torch.cat([places, given["input_ids"]], 1),
        "attention_mask": torch.cat([ones, given["attention_mask"]], 1),
    }
    wanted = step(model, given)
    features = VisionFeatures(tmp_path, model, dtype="float32")
    assert same(step(model, kept(features, given)), wanted)
    assert len(features) == 5
    refuse_to_run(model)
    assert same(step(model, kept(features, given)), wanted)


def test_image_of_prompt(tmp_path: Path) -> None:
    model = frozen()
    fastvlm.patch(model)
    given = batch(model) | {"image_of_prompt": torch.tensor([1, 0, 1])}
    given["pixel_values"] = given["pixel_values"][:2]
    wanted = step(model, given)
    features = VisionFeatures(tmp_path, model, dtype="float32")
    assert same(step(model, kept(features, given)), wanted)
    assert same(step(model, kept(features, given)), wanted)


def test_only_what_is_missing_is_computed(tmp_path: Path) -> None:
    model = frozen()
    features = VisionFeatures(tmp_path, model)
    given = batch(model)
    first = {**given, "pixel_values": features.pixel_values(given["pixel_values"][:2])}
    seen: list[int] = []
    tower = model.model.vision_tower
    tower.convs[0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].shape[0]))
    model.get_image_features(first["pixel_values"])
    model.get_image_features(kept(features, given)["pixel_values"])
    assert seen == [2, 1]


def test_a_tower_that_trains_is_refused(tmp_path: Path) -> None:
    model = frozen()
    features = VisionFeatures(tmp_path, model)
    given = kept(features, batch(model))
    step(model, given)
    weight = (
        model.model.vision_tower.blocks[1][0].spatial_block.ffn.fn.fc2.weight if False else None
    )
    del weight
    name, last = list(model.model.vision_tower.named_parameters())[-1]
    last.requires_grad_(True)
    for one in (given, kept(features, batch(model))):
        with pytest.raises(ValueError, match=f"frozen.*{name}.requires_grad is True"):
            step(model, one)
    with torch.no_grad():  # in evaluation nothing trains
        model(**given)


def test_projected_features_of_a_projector_that_trains_are_refused(tmp_path: Path) -> None:
    model = frozen(projector=True)
    features = VisionFeatures(tmp_path, model)
    model.model.multi_modal_projector.image_projection.requires_grad_(True)
    with pytest.raises(ValueError, match=r"image_projection\.weight\.requires_grad is True"):
        step(model, kept(features, batch(model)))


def test_stochastic_depth_is_left_out_and_said(tmp_path: Path) -> None:
    plain = frozen()
    config = copy.deepcopy(plain.config)
    config.vision_config.drop_path_rate = 0.5
    model = type(plain)(config).train()
    model.load_state_dict(plain.state_dict())
    model.model.vision_tower.requires_grad_(False)
    paths = [m for m in model.model.vision_tower.modules() if "DropPath" in type(m).__name__]
    assert paths
    model.model.vision_tower.eval()
    wanted = step(model, batch(model))
    model.train()
    features = VisionFeatures(tmp_path, model, dtype="float32")
    with pytest.warns(UserWarning, match="draws at random"):
        assert same(step(model, kept(features, batch(model))), wanted)
    assert all(path.training for path in paths)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert same(step(model, kept(features, batch(model))), wanted)


def _one_element(model: Any) -> None:
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).view(-1)[7] += 1e-3


def _whole_by_data(model: Any) -> None:
    next(model.model.vision_tower.parameters()).data.mul_(1.5)


def _another_tensor(model: Any) -> None:
    conv = model.model.vision_tower.convs[0].conv
    conv.weight = torch.nn.Parameter(conv.weight * 2, requires_grad=False)


def _half(model: Any) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [_one_element, _whole_by_data, _another_tensor, _half])
def test_weights_that_change_are_refused_at_once_and_later(change: Any, tmp_path: Path) -> None:
    model = frozen()
    features = VisionFeatures(tmp_path, model)
    read = kept(features, batch(model))
    step(model, read)
    features.flush()
    read = kept(features, batch(model))
    change(model)
    name = r"vision_tower\.blocks" if change is _half else r"vision_tower\.convs\.0\.conv"
    where = f"other weights: {name}"
    for given in (
        read,
        batch(model) | {"pixel_values": features.pixel_values(torch.ones(3, 3, 64, 64))},
    ):
        with pytest.raises(ValueError, match=where):
            step(model, given)
    with pytest.raises(ValueError, match=f"folder must be .*{where}"):
        VisionFeatures(tmp_path, model)


def test_what_changes_and_comes_back_is_no_change(tmp_path: Path) -> None:
    """As DDP does, which writes the weights of rank 0 into all of them."""
    model = frozen()
    features = VisionFeatures(tmp_path, model, dtype="float32")
    wanted = step(model, kept(features, batch(model)))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.clone())
    assert same(step(model, kept(features, batch(model))), wanted)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert same(step(model, kept(features, batch(model))), wanted)


def test_the_rest_of_the_model_may_train(tmp_path: Path) -> None:
    model = frozen()
    features = VisionFeatures(tmp_path, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(float(step(model, kept(features, batch(model)))[0]))
        optimizer.step()
    assert losses[2] < losses[0]


def test_features_of_another_folder_or_nobody(tmp_path: Path) -> None:
    model, other = frozen(), frozen()
    _one_element(other)
    features, others = VisionFeatures(tmp_path / "a", model), VisionFeatures(tmp_path / "b", other)
    for m, f in ((model, features), (other, others)):
        step(m, kept(f, batch(m)))
    with pytest.raises(ValueError, match="those of another folder"):
        step(model, kept(others, batch(model)))
    with pytest.raises(ValueError, match=r"what VisionFeatures.pixel_values gives"):
        step(model, batch(model) | {"pixel_values": {"what": 1}})
    # nobody takes it for pixels, patched or not, features or pixels to be kept, moved or not
    told = r"VisionFeatures: the model must have its VisionFeatures to take kept features.*unpatch"
    other = frozen()
    for given in (kept(features, batch(model)), kept(others, batch(other))):
        moved = {**given, "pixel_values": type(given["pixel_values"])(given["pixel_values"])}
        for inputs in (given, moved):
            with pytest.raises(AttributeError, match=told):
                step(frozen(), inputs)
            with fastvlm.patched(other), pytest.raises(AttributeError, match=told):
                step(other, inputs)
    with pytest.raises(ValueError, match="after VisionFeatures"):
        step(copy.deepcopy(model), kept(features, batch(model)))


def test_unpatch_and_detach_leave_nothing(tmp_path: Path) -> None:
    for end in ("unpatch", "detach"):
        model = frozen()
        parts = (model.model.vision_tower, model.model.multi_modal_projector)
        before = [(type(part), set(vars(part))) for part in parts]
        fastvlm.patch(model)
        features = VisionFeatures(tmp_path, model)
        step(model, kept(features, batch(model)))
        if end == "detach":
            features.detach()
        fastvlm.unpatch(model)
        assert [(type(part), set(vars(part))) for part in parts] == before


@pytest.mark.parametrize("kept_in", ["float32", "bfloat16"])
def test_arithmetic_of_autocast(kept_in: str, tmp_path: Path) -> None:
    """Features that autocast rounded are refused where nothing is rounded; the exact ones serve."""
    model = frozen()

    def run(features: VisionFeatures, autocast: bool, given: dict[str, Any]) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model.get_image_features(kept(features, given)["pixel_values"]).last_hidden_state

    given = batch(model)
    features = VisionFeatures(tmp_path, model, dtype="float32")
    one = run(features, kept_in == "bfloat16", given)
    assert features.store.arithmetic == kept_in
    if kept_in == "bfloat16":
        assert torch.equal(run(features, True, given), one)
        with pytest.raises(ValueError, match=r"arithmetic of the tower.*must be float32, or bfl"):
            run(features, False, given)
        return
    exact = model.model.vision_tower.eval()(given["pixel_values"] * 2).last_hidden_state
    assert torch.equal(run(features, True, given), one)
    more = given | {"pixel_values": given["pixel_values"] * 2}
    assert torch.equal(run(features, True, more), exact)  # filled without autocast, too


def test_workers_read_what_the_model_kept(tmp_path: Path) -> None:
    model = frozen()
    features = VisionFeatures(tmp_path, model)
    given = batch(model)
    rows = [{name: value[i] for name, value in given.items()} for i in range(3)]
    loader = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=3,
        num_workers=2,
        collate_fn=features.collator(torch.utils.data.default_collate),
    )
    (first,) = loader
    assert set(first["pixel_values"]) == {"pixel_values", "image_keys"}
    wanted = step(model, first)
    features.flush()
    (second,) = loader
    assert set(second["pixel_values"]) == {"features", "features_of"}
    assert same(step(model, second), wanted)
    there = pickle.loads(pickle.dumps(features))  # what a worker gets that is no fork
    assert same(step(model, kept(there, given)), wanted)


def test_bad_arguments(tmp_path: Path) -> None:
    model = frozen()
    (tmp_path / "file").touch()
    features = VisionFeatures(tmp_path / "new", model)
    assert not (tmp_path / "new").exists(), "nothing is made before there is something to keep"
    for name, call in {
        "dtype": lambda: VisionFeatures(tmp_path, model, dtype="int8"),
        "part": lambda: VisionFeatures(tmp_path, model, part="head"),
        "folder": lambda: VisionFeatures(tmp_path / "file", model),
        "model": lambda: VisionFeatures(tmp_path, torch.nn.Linear(2, 2)),
        "image_processor": lambda: VisionFeatures(tmp_path, model, lambda images: images),
        "images": lambda: features.pixel_values([]),
        r"images\[1\]": lambda: features.pixel_values([torch.ones(3, 8, 8), "no such file"]),
        "processor": lambda: features.pixel_values(
            [torch.ones(3, 8, 8).mul(9).byte().permute(1, 2, 0).numpy()]
        ),
    }.items():
        with pytest.raises(ValueError, match=f"^fastvlm.*{name} must be"):
            call()
    kept, tower = features.pixel_values(torch.ones(1, 3, 64, 64)), model.model.vision_tower
    for name, value in {
        "output_hidden_states": True,
        "output_attentions": True,
        "interpolate_pos_encoding": True,
        "return_dict": False,
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be left out"):
            tower(kept, **{name: value})
    with pytest.raises(ValueError, match="must be given by name beside kept features"):
        tower(kept, True)
    tower(kept, return_dict=True, output_attentions=None)
