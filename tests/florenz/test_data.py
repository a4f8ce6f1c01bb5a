"""Annotations and shards: as published, whole or not at all, and whatever is wrong is named."""

from __future__ import annotations

import json
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvlm.__main__ import main
from fastvlm.florenz.data import (
    GROUPS,
    Annotation,
    DataError,
    ShardSamples,
    annotations_of,
    marked_prompt,
    spelled_prompt,
    write_shards,
)
from fastvlm.florenz.world import build, read
from fastvlm.packing import PackingCollator, find_groups

DESCRIPTION = {
    "en": "A brown dog runs. It carries a stick! Is the beach empty?",
    "de": "Ein brauner Hund rennt. Er trägt einen Stock! Ist der Strand leer?",
}
PAIRS = {
    "fr": [
        ("The dog is running on the beach.", "Le chien court sur la plage."),
        ("A stick lies on the wet sand.", "Un bâton est posé sur le sable mouillé."),
    ],
    "zh": [("Too short.", "太短。"), ("The dog is running on the beach.", "狗在沙滩上奔跑。")],
}


def test_annotations_of_a_description() -> None:
    found = annotations_of(DESCRIPTION, PAIRS, random.Random(0))
    count = Counter((a.task, a.language) for a in found)
    assert count == {
        ("caption", "en"): 3, ("caption", "de"): 3, ("translation", "de"): 1,
        ("translation", "fr"): 3, ("translation", "zh"): 1,
    }  # fmt: skip
    english = [a for a in found if (a.task, a.language) == ("caption", "en")]
    assert english[0] == Annotation("caption", "en", "<LANG_EN><CAPTION>", "A brown dog runs.")
    assert english[1].prompt == "<LANG_EN><MORE_DETAILED_CAPTION>"
    assert english[1].text == DESCRIPTION["en"]
    parts = ["A brown dog runs.", "It carries a stick!", "Is the beach empty?"]
    assert sum(part in english[2].text for part in parts) >= 2
    (german,) = (a for a in found if (a.task, a.language) == ("translation", "de"))
    assert german.prompt == f"<LANG_DE><TRANSLATE>{DESCRIPTION['en']}"
    assert german.text == DESCRIPTION["de"]
    paragraph = [a for a in found if a.language == "fr"][-1]
    assert {source for source, _ in PAIRS["fr"] if source in paragraph.prompt} == {
        source for source, text in PAIRS["fr"] if text in paragraph.text
    }
    assert len(paragraph.text) > max(len(text) for _, text in PAIRS["fr"])


def test_short_descriptions_give_no_captions() -> None:
    assert annotations_of({"en": "A dog.", "de": "Ein Hund."}, {}, random.Random(0)) == []


def test_two_sentences_are_a_detailed_caption() -> None:
    description = {"en": "A brown dog runs. It carries a stick."}
    prompts = [a.prompt for a in annotations_of(description, {}, random.Random(0))]
    assert prompts[:2] == ["<LANG_EN><CAPTION>", "<LANG_EN><DETAILED_CAPTION>"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (
            "<LANG_DE><CAPTION>",
            "The target language is German. What does the image describe?",
        ),
        (
            "<LANG_ZH><TRANSLATE>A dog: <b>.",
            "The target language is simplified Chinese. Translate the following text: A dog: <b>.",
        ),
        ("What is this?", "What is this?"),
    ],
)
def test_prompts_are_spelled_as_published(prompt: str, words: str) -> None:
    assert spelled_prompt(prompt) == words


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: marked_prompt("it", "<CAPTION>"), "language must be"),
        (lambda: marked_prompt("de", "<DANCE>"), "task must be"),
        (lambda: spelled_prompt("<LANG_IT><CAPTION>"), "language of a prompt must be"),
        (lambda: annotations_of({"de": "Ein Hund."}, {}, random.Random(0)), "given in 'en' too"),
        (lambda: annotations_of({}, {"it": []}, random.Random(0)), "a language of pairs must be"),
    ],
)
def test_what_nobody_knows_is_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_shards(build.samples(10, size=32, seed=3), folder, per_shard=4)
    return folder


def test_shards_hold_what_was_written(shards: Path) -> None:
    assert [path.name for path in sorted(shards.iterdir())] == [
        f"shard-{n:06d}.tar" for n in range(3)
    ]
    samples = ShardSamples(shards)
    found = list(samples)
    assert len(found) == samples.tally.samples == 10
    assert samples.tally.groups == Counter(dict.fromkeys(GROUPS, 10))
    assert samples.tally.skipped == []
    for sample, (picture, texts) in zip(found, build.samples(10, size=32, seed=3)):
        assert (np.asarray(sample["image"]) == np.asarray(picture)).all()
        for target, annotation in zip(sample["targets"], texts):
            assert target["text"] == annotation.text
            assert target["prompt"] == spelled_prompt(annotation.prompt)
            assert read(target["text"], target["language"]).scene is not None
    assert found[5]["image_id"] == "shard-000001/000000005"


def test_equal_samples_give_equal_bytes(shards: Path, tmp_path: Path) -> None:
    write_shards(build.samples(10, size=32, seed=3), tmp_path, per_shard=4)
    for path in shards.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_caption_of_the_world_tells_its_picture_and_a_translation_another() -> None:
    for _, texts in build.samples(20, size=16):
        scenes = {(a.task, a.language): read(a.text, a.language).scene for a in texts}
        shown = scenes["caption", "en"]
        assert shown is not None
        assert scenes["caption", "de"] == shown
        for (task, _), scene in scenes.items():
            assert scene is not None
            if task == "translation":
                assert set(scene.groups) & set(shown.groups)


def test_the_samples_are_those_of_the_collator(shards: Path) -> None:
    samples = list(ShardSamples(shards))
    assert sorted(find_groups(samples)) == sorted(GROUPS)

    class Letters:
        pad_token_id, eos_token_id = 0, 1

        def __call__(self, text: str) -> dict[str, Any]:
            return {"input_ids": [2 + ord(letter) % 90 for letter in text]}

    class Pixels:
        def __call__(self, images: list[Any], return_tensors: str) -> dict[str, Any]:
            import torch

            stacked = np.stack([np.asarray(image) for image in images])
            return {"pixel_values": torch.tensor(stacked).permute(0, 3, 1, 2).float()}

    collator = PackingCollator(groups=GROUPS, tokenizer=Letters(), image_processor=Pixels())
    batch = collator(samples[:3])
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["labels"].shape[0] == 3 * len(GROUPS)


def test_reading_goes_on_where_it_stopped(shards: Path) -> None:
    samples = ShardSamples(shards)
    whole = [sample["image_id"] for sample in samples]
    started = iter(samples)
    first = [next(started)["image_id"] for _ in range(6)]
    another = ShardSamples(shards)
    another.load_state_dict(samples.state_dict())
    assert first + [sample["image_id"] for sample in another] == whole
    assert [sample["image_id"] for sample in another] == whole  # from the start again


def test_what_stops_in_the_middle_leaves_whole_shards(tmp_path: Path) -> None:
    def broken() -> Any:
        yield from build.samples(5, size=16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(broken(), tmp_path, per_shard=3)
    assert [path.name for path in sorted(tmp_path.glob("*.tar"))] == ["shard-000000.tar"]
    assert len(list(ShardSamples(tmp_path))) == 3


def _tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            (path.parent / "content").write_bytes(content)
            tar.add(path.parent / "content", name)


def _picture(folder: Path) -> bytes:
    Image.new("RGB", (8, 8)).save(folder / "p.png")
    return (folder / "p.png").read_bytes()


def _record(**changes: Any) -> dict[str, Any]:
    good = Annotation("caption", "en", "<LANG_EN><CAPTION>", "A dog.").record()
    return {**good, **changes}


def test_every_kind_of_fault_is_named_and_skipped(tmp_path: Path) -> None:
    picture = _picture(tmp_path)

    def text(*records: Any) -> bytes:
        return json.dumps({"annotations": list(records)}).encode()

    _tar(
        tmp_path / "a.tar",
        {
            "0.png": picture, "0.json": text(_record()),
            "1.json": text(_record()),
            "2.png": picture,
            "3.png": picture[:40], "3.json": text(_record()),
            "4.png": picture, "4.json": b"{",
            "5.png": picture, "5.json": text(_record(language="xx")),
            "6.png": picture, "6.json": text(_record(text=" "), _record()),
            "7.png": picture, "7.json": b"[]",
            "8.png": picture, "8.json": text(_record(task="dance"), 7),
        },
    )  # fmt: skip
    samples = ShardSamples(tmp_path / "a.tar")
    assert [sample["image_id"] for sample in samples] == ["a/0", "a/6"]
    named = {name.removeprefix("a/")[0] for name, _ in samples.tally.skipped}
    assert named == set("12345678")
    reasons = " ".join(why for _, why in samples.tally.skipped)
    for word in (
        "no picture",
        "no annotations",
        "does not decode",
        "'xx'",
        "do not read",
        "'dance'",
    ):
        assert word in reasons
    with pytest.raises(DataError, match="a/1: no picture"):
        list(ShardSamples(tmp_path / "a.tar", strict=True))


def test_a_damaged_shard_does_not_stop_the_others(shards: Path, tmp_path: Path) -> None:
    paths = sorted(shards.iterdir())
    (tmp_path / "shard-0.tar").write_bytes(paths[0].read_bytes()[:6000])
    (tmp_path / "shard-1.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "shard-2.tar").write_bytes(paths[1].read_bytes())
    samples = ShardSamples(tmp_path)
    assert len([s for s in samples if s["image_id"].startswith("shard-2/")]) == 4
    assert {Path(name).name for name, why in samples.tally.skipped if "damaged" in why} == {
        "shard-0.tar", "shard-1.tar",
    }  # fmt: skip
    with pytest.raises(DataError, match="damaged"):
        list(ShardSamples(tmp_path, strict=True))


def test_the_command_makes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "made")
    arguments = ["florenz", "data", "--world", "--images", "5", "--size", "16", "--per-shard", "2"]
    assert main([*arguments, "--out", out]) == 0
    assert "3 shards" in capsys.readouterr().out
    assert main(["florenz", "data", "--check", out]) == 0
    printed = capsys.readouterr().out
    assert "5 samples in 3 shards" in printed
    assert "translation" in printed
    assert main([*arguments, "--out", out]) == 2  # it holds shards already
    assert "one without shards" in capsys.readouterr().err
    assert main(["florenz", "data", "--check", str(tmp_path / "none")]) == 2
    assert main(arguments) == 2


def test_the_command_reads_descriptions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.png").write_bytes(_picture(tmp_path))
    good = {"image": "p.png", "description": DESCRIPTION, "pairs": PAIRS}
    lines = [json.dumps(good), json.dumps({**good, "image": "none.png"}), "{"]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    arguments = ["florenz", "data", "--from", str(tmp_path / "in.jsonl"), "--out"]
    assert main([*arguments, str(tmp_path / "a")]) == 1
    printed = capsys.readouterr().err
    assert "in.jsonl:2: FileNotFoundError" in printed
    assert "in.jsonl:3: JSONDecodeError" in printed
    assert len(list(ShardSamples(tmp_path / "a"))) == 1
    assert main([*arguments, str(tmp_path / "b"), "--strict"]) == 1
    assert "in.jsonl:2" in capsys.readouterr().err
