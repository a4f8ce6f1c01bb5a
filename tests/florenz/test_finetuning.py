"""Fine-tuning: the published recipe, from a checkpoint, on shards, public sets and the world."""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import public_sets
import pytest
import torch
from safetensors.torch import load_file

from fastvlm.__main__ import main
from fastvlm.captioning.models import pretrained
from fastvlm.florenz.data import DataError, write_shards
from fastvlm.florenz.data.indexed import IndexedShards
from fastvlm.florenz.data.public import READERS
from fastvlm.florenz.training import finetune_command
from fastvlm.florenz.training.settings import FineTuning
from fastvlm.florenz.training.sizes import SIZES
from fastvlm.florenz.training.sources import SetSource, ShardSource, Shuffled, WorldSource
from fastvlm.florenz.world.build import samples

SHORT = ["--steps", "4", "--batch", "2", "--targets", "2", "--accumulate", "1", "--save-steps", "2"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return public_sets.checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def tuned(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the small world, patched."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run") / "out"
    assert main(["florenz", "finetune", str(begun), "--world", "--out", str(out), *SHORT]) == 0
    torch.set_num_threads(threads)
    return out


def logged(out: Path) -> list[dict[str, float]]:
    log = json.loads((out / "results.json").read_text())["log"]
    return [{k: v for k, v in entry.items() if k.startswith("loss")} for entry in log]


def test_the_recipe_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    finetune_command.add(parser)
    args = parser.parse_args(["m", "--out", "o", "--world"])
    assert (args.steps, args.batch, args.targets, args.warm_up, args.seed) == (
        5000,
        32,
        1,
        100,
        44595,
    )
    assert (args.learning_rate, args.weight_decay) == (5e-5, 0.05)
    assert finetune_command.GLOBAL_BATCH == 256


def test_what_is_trained_is_what_was_published(begun: Path, tuned: Path) -> None:
    settings = json.loads((tuned / "settings.json").read_text())
    assert FineTuning(**settings).size == "mini"
    before, after = (load_file(out / "model.safetensors") for out in (begun, tuned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = (".vision_tower.", ".multi_modal_projector.", ".self_attn.", ".mlp.")
    decoder = {name for name in changed if ".decoder." in name}
    assert not any(".vision_tower." in name or "projector" in name for name in changed)
    assert decoder
    assert not any(part in name for name in decoder for part in frozen)
    assert any(".encoder.layers." in name for name in changed)


def test_what_it_leaves_is_a_checkpoint(tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "more"
    assert pretrained(str(tuned), None, "cpu").model.config.has_gemma_decoder
    assert main(["florenz", "finetune", str(tuned), "--world", "--out", str(out), *SHORT[:2],
                 *SHORT[2:8], "--unpatched"]) == 0  # fmt: skip


@pytest.mark.slow
def test_a_run_resumes_to_the_same_losses(begun: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(tuned, out)
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    command = ["florenz", "finetune", str(begun), "--world", "--out", str(out), *SHORT, "--resume"]
    assert main(command) == 0
    assert logged(out) == logged(tuned)
    one, two = (load_file(folder / "model.safetensors") for folder in (tuned, out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert main([*command, "--seed", "1"]) == 2


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(samples(5, size=32), tmp_path / "shards", per_shard=2)
    return tmp_path / "shards"


def test_shards_by_number_are_shards_in_order(shards: Path) -> None:
    from fastvlm.florenz.data import ShardSamples

    indexed = IndexedShards(shards)
    assert len(indexed) == 5
    for number, wanted in reversed(list(enumerate(ShardSamples(shards)))):
        found = indexed[number]
        assert found["image"].tobytes() == wanted["image"].tobytes()
        assert {k: found[k] for k in ("image_id", "targets")} == {
            k: wanted[k] for k in ("image_id", "targets")
        }
    assert indexed.tally.groups == dict.fromkeys(indexed.tally.groups, 5)
    packed = shards / "shard-000000.tar"
    packed.write_bytes(gzip.compress(packed.read_bytes()))
    fewer = IndexedShards(shards)
    assert len(fewer) == 3
    assert "shard-000000.tar" in fewer.tally.skipped[0][0]
    with pytest.raises(DataError, match=r"shard-000000\.tar"):
        IndexedShards(shards, strict=True)


def test_a_picture_that_does_not_decode_is_named(shards: Path) -> None:
    file = shards / "shard-000000.tar"
    content = bytearray(file.read_bytes())
    start = content.index(b"\x89PNG")
    content[start : start + 64] = bytes(64)
    file.write_bytes(content)
    with pytest.raises(DataError, match="shard-000000/000000000: the picture does not decode"):
        IndexedShards(shards)[0]


def test_every_sample_comes_once_an_epoch_in_another_order(shards: Path) -> None:
    source = ShardSource(IndexedShards(shards))
    assert ("caption", "de") in source.groups
    shuffled = Shuffled(source, seed=3)
    ids = [shuffled(number).image_id for number in range(15)]
    epochs = [ids[:5], ids[5:10], ids[10:]]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = Shuffled(source, seed=3)  # whatever was asked for before
    assert [again(number).image_id for number in (12, 1, 7)] == [ids[12], ids[1], ids[7]]


def test_sources_have_the_texts_of_their_sets(tmp_path: Path) -> None:
    commute = SetSource(READERS["commute"](public_sets.commute(tmp_path), None, "", ["de"]))
    assert commute.groups == [("translation", "de")]
    (text,) = commute[0].annotations
    assert (text.prompt, text.text) == ("<LANG_DE><TRANSLATE>The bank.", "Die Bank.")
    assert commute[0].image.size == (40, 32)
    world = WorldSource(SIZES["mini"], 0)
    counts = Counter((text.task, text.language) for text in world[0].annotations)
    assert counts == dict.fromkeys(world.groups, 1)
    assert len(world.groups) == 11


@pytest.mark.slow
def test_shards_and_sets_are_trained_on(begun: Path, shards: Path, tmp_path: Path) -> None:
    command = ["florenz", "finetune", str(begun), *SHORT]
    assert main([*command, "--shards", str(shards), "--out", str(tmp_path / "one")]) == 0
    settings = json.loads((tmp_path / "one" / "settings.json").read_text())
    assert settings["data"] == {"shards": str(shards), "samples": 5}
    root = public_sets.coco(tmp_path / "coco")
    words = ["--set", "coco", "--data", str(root), "--out", str(tmp_path / "two")]
    assert main([*command, *words]) == 0
    assert set(logged(tmp_path / "two")[0]) == {"loss", "loss/caption-en"}


def test_arguments_that_cannot_be_used(
    begun: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "new")]
    plain: list[Any] = ["florenz", "finetune", str(begun), *SHORT]
    for more, words in [
        (["--set", "coco", *out], "--data wants the files of coco; got none"),
        (["--set", "coco", "--data", str(tmp_path), *out], "dataset_coco.json does not read"),
        (["--shards", str(tmp_path / "none"), *out], "--shards wants"),
        (["--world", "--data", "x", *out], "--data wants --set beside it"),
        (["--world", "--out", str(tuned)], "new or empty"),
        (["--world", "--weight-decay", "nan", *out], "--weight-decay wants"),
        (["--world", "--learning-rate", "0", *out], "--learning-rate wants"),
    ]:
        assert main([*plain, *more]) == 2
        told = capsys.readouterr().err
        assert words in told
        assert told.count("\n") == 1
    assert main(["florenz", "finetune", str(tmp_path), "--world", *out]) == 2
    assert "--world wants a model of the small world" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
