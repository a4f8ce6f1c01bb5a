"""The folder: what differs is named, what breaks off is whole, what is broken is computed again."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from towers import batch, frozen, refuse_to_run, step
from transformers import CLIPImageProcessor

from fastvlm import VisionFeatures
from fastvlm.features import store as store_module
from fastvlm.features.shards import Shards
from fastvlm.features.store import Store

SIZE = {"height": 64, "width": 64}
ABOUT: dict[str, Any] = {
    "format": 1, "part": "tower", "dtype": "bfloat16", "code": {}, "transform": None,
    "weights": {"vision_tower.w": "float32 [1] 0"}, "structure": {},
}  # fmt: skip


def processor(**settings: Any) -> CLIPImageProcessor:
    calm = {"do_center_crop": False, "size": SIZE, "resample": 3}
    return CLIPImageProcessor(**{**calm, **settings})


def picture(shade: int = 0) -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").point(lambda v: (v + shade) % 256)


def filled(folder: Path, *, flush: bool = True, count: int = 3) -> tuple[Any, VisionFeatures]:
    model = frozen()
    features = VisionFeatures(folder, model, processor())
    model.get_image_features(features.pixel_values([picture(i) for i in range(count)]))
    if flush:
        features.flush()
    return model, features


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def store(folder: Path) -> Store:
    return Store(folder, ABOUT, fill=True)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def rows(first: int, count: int) -> dict[bytes, torch.Tensor]:
    return {key(i): torch.full((4, 8), float(i)).bfloat16() for i in range(first, first + count)}


def are_right(kept: Store, count: int) -> int:
    """How many of so many keys are there, each with its own features."""
    found = kept.rows([key(i) for i in range(count)])
    assert all(bool((row == int.from_bytes(k, "little")).all()) for k, row in found.items())
    return len(found)


def test_pictures_are_transformed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, features = filled(tmp_path)
    picture(1).save(tmp_path / "one.png")
    read = features.pixel_values([tmp_path / "one.png", picture(2), picture(2)])
    assert set(read) == {"features", "features_of"}
    pixels = processor()(images=[picture(1), picture(2)], return_tensors="pt")["pixel_values"]
    wanted = model.model.vision_tower.eval()(pixels).last_hidden_state.bfloat16()
    assert torch.equal(read["features"], wanted[[0, 1, 1]])


OTHERS: dict[str, Any] = {
    "size": {"height": 96, "width": 64},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.4, 0.3],
    "do_center_crop": True,
    "resample": 2,
    "rescale_factor": 0.004,
}


def test_another_transform_is_refused(tmp_path: Path) -> None:
    model, features = filled(tmp_path)
    for setting, value in OTHERS.items():
        with pytest.raises(ValueError, match=f"kept with transform {setting}: .*, here .*"):
            VisionFeatures(tmp_path, model, processor(**{setting: value}))
        before = getattr(features.image_processor, setting)
        setattr(features.image_processor, setting, value)  # of the one that is in use
        with pytest.raises(ValueError, match="image_processor must be as it was"):
            features.pixel_values([picture()])
        setattr(features.image_processor, setting, before)
    assert "features" in features.pixel_values([picture()])


def test_no_transform_is_another_one(tmp_path: Path) -> None:
    model, _ = filled(tmp_path)
    with pytest.raises(ValueError, match="transform one, here none"):
        VisionFeatures(tmp_path, model)


def test_another_tower_part_or_dtype_is_refused(tmp_path: Path) -> None:
    model, _ = filled(tmp_path)
    for setting, value in (("dtype", "float32"), ("part", "projector")):
        with pytest.raises(ValueError, match=f"{setting} '.*', here '{value}'"):
            VisionFeatures(tmp_path, model, processor(), **{setting: value})
    config = model.config
    config.vision_config.embed_dim = [16, 32, 32, 48]
    config.vision_config.window_size = 3
    resized = type(model)(config)
    with pytest.raises(ValueError) as told:
        VisionFeatures(tmp_path, resized, processor())
    for words in (
        "code vision_tower.embed_dim: ",
        "48]",
        "other weights: vision_tower",
        "window_size",
    ):
        assert words in str(told.value)
    config.vision_config.window_size = 4
    config.vision_config.embed_dim = [16, 32, 32, 32]
    config.vision_config.drop_path_rate = 0.3  # which says nothing of evaluation
    same = type(model)(config)
    same.load_state_dict(model.state_dict())
    VisionFeatures(tmp_path, same, processor())


def test_a_process_that_is_killed_leaves_whole_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 1)

    def write() -> None:
        torch.set_num_threads(1)  # the threads of the parent's pool are not there
        kept = store(tmp_path)
        for i in range(10**6):
            kept.keep(rows(i, 1), "float32")

    child = multiprocessing.get_context("fork").Process(target=write)
    child.start()
    while len(shards(tmp_path)) < 5:
        assert child.is_alive()
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert are_right(store(tmp_path), 10**4) == len(shards(tmp_path)) >= 5


def test_what_was_half_written_is_removed(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    model, _ = filled(tmp_path)
    host = os.uname().nodename
    for pid in (child.pid, os.getpid()):
        (tmp_path / f".00.{host}.{pid}.part").write_bytes(b"x" * 100)
    (tmp_path / f".00.elsewhere.{child.pid}.part").touch()
    assert len(VisionFeatures(tmp_path, model, processor())) == 3
    left = {path.name for path in tmp_path.glob(".*.part")}
    assert left == {f".00.{host}.{os.getpid()}.part", f".00.elsewhere.{child.pid}.part"}


def test_processes_fill_and_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 200)
    fork = multiprocessing.get_context("fork")
    failed = fork.Queue()

    def work(rank: int) -> None:
        try:
            torch.set_num_threads(1)
            kept = store(tmp_path)
            for i in range(0, 40, 2):
                kept.keep(rows(i + rank, 2), "float32")  # half of it is the other's as well
                are_right(kept, 42)
            kept.flush()
        except BaseException as error:
            failed.put(repr(error))
            raise

    children = [fork.Process(target=work, args=(rank,)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0], failed.get(timeout=9)
    last = store(tmp_path)
    assert are_right(last, 50) == len(last) == 41


def test_who_comes_second_is_refused_if_it_is_of_something_else(tmp_path: Path) -> None:
    first, other = store(tmp_path), Store(tmp_path, {**ABOUT, "dtype": "float32"}, fill=True)
    first.keep(rows(0, 1), "float32")
    with pytest.raises(ValueError, match="dtype 'bfloat16', here 'float32'"):
        other.keep(rows(0, 1), "float32")


@pytest.mark.parametrize("damage", ["cut", "empty", "bytes", "gone", "text"])
def test_a_broken_shard_is_computed_again(damage: str, tmp_path: Path) -> None:
    model, features = filled(tmp_path)
    wanted = features.read([features.key(picture(i)) for i in range(3)])
    assert wanted is not None
    (path,) = shards(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "bytes":
        at = data.find(bytes(wanted[0].view(torch.uint8).numpy().tobytes()[:16]))
        data[at + 5] ^= 1
    path.unlink()
    if damage != "gone":
        new = {"cut": data[:-9], "empty": b"", "bytes": data, "text": b"{" * 500}[damage]
        path.write_bytes(new)
    again = VisionFeatures(tmp_path, model, processor()) if damage == "bytes" else None
    if again is None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            again = VisionFeatures(tmp_path, model, processor())
        assert [path.name in str(one.message) for one in told] == [True] * (damage != "gone")
    given = [picture(i) for i in range(3)]
    if damage == "bytes":
        with pytest.warns(UserWarning, match=f"{path.name} cannot be read .*bytes are not those"):
            entry = again.pixel_values(given)
    else:
        entry = again.pixel_values(given)
    assert "features" not in entry
    model.get_image_features(entry)
    again.flush()
    refuse_to_run(model)
    assert torch.equal(again.pixel_values(given)["features"], wanted)


def test_a_shard_of_something_else_is_refused(tmp_path: Path) -> None:
    model, features = filled(tmp_path)
    Shards(tmp_path).add("other", torch.ones(1, 32, 2, 2).bfloat16(), [key(1)])
    for call in (
        lambda: VisionFeatures(tmp_path, model, processor()),
        lambda: features.pixel_values([picture(9)]),
    ):
        with pytest.raises(ValueError, match=r"all shards are of its features\.json"):
            call()


def test_a_folder_without_its_description_is_refused(tmp_path: Path) -> None:
    model, _ = filled(tmp_path)
    path = tmp_path / "features.json"
    for text in (None, b"", b"{", b"[]", b"{}", b"\xff"):
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_bytes(text)
        with pytest.raises(ValueError, match=r"folder must be .*features\.json"):
            VisionFeatures(tmp_path, model, processor())


def test_a_full_disk_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    model, features = filled(tmp_path, flush=False)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.warns(UserWarning, match="No space left on device.*without keeping any more"):
        features.flush()
    given = batch(model)
    loss, _ = step(model, given)
    given["pixel_values"] = features.pixel_values(given["pixel_values"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(step(model, given)[0], loss, rtol=1e-2)
        features.flush()
    assert os.listdir(tmp_path) == ["features.json"]


def test_a_folder_that_cannot_be_made_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    model = frozen()
    features = VisionFeatures(tmp_path / "features", model)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.warns(UserWarning, match="without keeping any more"):
        model.get_image_features(features.pixel_values(torch.ones(1, 3, 64, 64)))


def test_reading_alone_writes_nothing(tmp_path: Path) -> None:
    model = frozen()
    features = VisionFeatures(tmp_path / "new", model, fill=False)
    model.get_image_features(features.pixel_values(torch.ones(1, 3, 64, 64)))
    features.flush()
    assert not (tmp_path / "new").exists()


def test_images_of_several_sizes(tmp_path: Path) -> None:
    model = frozen()
    features = VisionFeatures(tmp_path, model)
    for size in (64, 96):
        model.get_image_features(features.pixel_values(torch.ones(2, 3, size, size)))
    features.flush()
    assert len(shards(tmp_path)) == len(features) == 2
    for size in (64, 96):
        shape = features.pixel_values(torch.ones(2, 3, size, size))["features"].shape
        assert shape == (2, 32, size // 32, size // 32)


def test_shards_are_written_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, features = filled(tmp_path, flush=False)
    assert shards(tmp_path) == []
    monkeypatch.setattr("fastvlm.features.kept.SECONDS", 0.0)
    model.get_image_features(features.pixel_values([picture(0)]))  # which waits, and is read
    assert len(shards(tmp_path)) == 1


def test_the_description_can_be_read_by_people(tmp_path: Path) -> None:
    filled(tmp_path)
    told = json.loads((tmp_path / "features.json").read_text())
    assert (told["arithmetic"], told["dtype"]) == ("float32", "bfloat16")
    assert told["transform"]["size"] == SIZE
    (path,) = shards(tmp_path)
    kept = load_file(path)
    assert kept["features"].shape == (3, 32, 2, 2)
    save_file(kept, tmp_path / "copy.safetensors")  # without what it is of
    with pytest.raises(ValueError, match=r"copy\.safetensors is of others"):
        Store(tmp_path, {k: v for k, v in told.items() if k != "arithmetic"}, fill=True)
