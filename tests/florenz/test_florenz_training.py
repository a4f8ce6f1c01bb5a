"""The reference trainer: one command from nothing, resumable, balanced, and what it measures."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fastvlm
from fastvlm.__main__ import main
from fastvlm.captioning.models import pretrained
from fastvlm.florenz import FlorenzForConditionalGeneration
from fastvlm.florenz.data import GROUPS
from fastvlm.florenz.training.batches import (
    Sentences,
    Words,
    collator_of,
    world_batches,
    world_words,
)
from fastvlm.florenz.training.emergence import group_of, held_out, losses, score
from fastvlm.florenz.training.sizes import SIZES, config_of
from fastvlm.florenz.training.tokenizers import prompt_tokenizer, text_tokenizer
from fastvlm.florenz.training.vision import LABELS, Namer, Pictures, labels_of, picture_batch
from fastvlm.florenz.world import PREFIXES, Group, Scene, draw_scene, language_of, read, sentence
from fastvlm.florenz.world.grammar import FRAMES, LANGUAGES

MINI = ["florenz", "train", "--size", "mini", "--steps", "4", "--language-steps", "2"]
MINI += ["--vision-steps", "2"]
FAST = [*MINI, "--save-steps", "2", "--scenes", "2"]
TWO = Scene(Group(1, None, "red", "ball"), "left of", Group(2, None, "blue", "cup"))


@pytest.fixture(scope="module")
def words() -> Words:
    return Words(prompt_tokenizer(), text_tokenizer())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, patched."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run") / "out"
    assert main([*FAST, "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    return out


def logged(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "results.json").read_text())["log"]
    return found


def by_group(entry: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name.startswith("loss")}


def test_every_sentence_is_its_tokens(words: Words) -> None:
    chance = random.Random(3)
    for _ in range(100):
        scene, frame = draw_scene(chance), chance.choice(FRAMES)
        for code in LANGUAGES:
            text = sentence(scene, code, frame)
            (ids,) = words.text_ids([text])
            assert words.texts.unk_token_id not in ids
            assert words.texts.decode(ids, skip_special_tokens=True) == text
        asked = f"<LANG_ZH><TRANSLATE>{sentence(scene, 'en', frame)}"
        assert words.prompts.unk_token_id not in words.prompt_ids([asked])[0]


@pytest.mark.parametrize("code", PREFIXES)
def test_a_prefix_begins_the_tokens_of_a_caption(words: Words, code: str) -> None:
    caption, prefix = words.text_ids([sentence(TWO, code), PREFIXES[code]])
    assert caption[: len(prefix) - 1] == prefix[:-1]


def test_batches_are_balanced_and_functions_of_their_number(words: Words) -> None:
    size = SIZES["tiny"]
    config = config_of(size, "frozen", len(words.prompts) - 1, len(words.texts))
    collator = collator_of(size, config, 0)
    data = world_batches(size, words, collator, 4, seed=0)
    batch = collator([data[3]])
    counts = Counter(batch["groups"].tolist())
    assert batch["labels"].shape[0] == size.images * size.targets
    assert len(counts) == len(GROUPS)
    assert max(counts.values()) - min(counts.values()) <= 2
    again = world_batches(size, words, collator_of(size, config, 0), 9, seed=0)
    _ = again[1]  # another batch, drawn before, changes nothing
    other = collator([again[3]])
    assert all(torch.equal(batch[k], other[k]) for k in batch if isinstance(batch[k], torch.Tensor))
    assert not torch.equal(collator([data[0]])["pixel_values"], batch["pixel_values"])


def test_no_caption_is_seen_in_the_four_languages(words: Words) -> None:
    assert {code for task, code in GROUPS if task == "caption"} == {"en", "de"}
    texts = Sentences(SIZES["tiny"], words, ("en", "de"), 1, seed=0)[0]
    spoken = {language_of(words.texts.decode(ids, skip_special_tokens=True)) for ids in texts}
    assert spoken == {"en", "de"}


def test_scores_read_the_captions() -> None:
    right = sentence(TWO, "fr")
    mirrored = sentence(TWO.mirrored, "fr")
    assert mirrored != right
    swapped = sentence(Scene(TWO.second, TWO.relation, TWO.first), "fr")  # type: ignore[arg-type]
    english, alone = sentence(TWO, "en"), PREFIXES["fr"]
    broken = right.replace("un ballon", "une ballon")
    assert broken != right
    texts = [right, mirrored, swapped, english, alone, broken]
    found = score([TWO] * len(texts), texts, "fr")
    # the prefix was given: alone it is no French
    assert found.spoken == {"fr": 4, "en": 1, "none": 1}
    assert (found.language, found.exact) == (4 / 6, 2 / 6)
    assert found.objects == (3 + (read(broken, "fr").groups == read(right, "fr").groups)) / 6


def test_a_run_leaves_a_model_that_captions(trained: Path, tmp_path: Path) -> None:
    loaded = pretrained(str(trained), None, "cpu")
    assert loaded.model.config.has_gemma_decoder
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    assert (
        main(["caption", "--image", str(picture), "--model", str(trained), "--new-tokens", "4"])
        == 0
    )
    results = json.loads((trained / "results.json").read_text())
    assert [look["step"] for look in results["history"]] == [1, 2, 3, 4]
    assert set(results["emergence"]["losses"]) == {"SC", "ST", "UC"}
    assert Image.open(trained / "emergence.png").size[0] > 500


@pytest.mark.slow
def test_a_run_resumes_to_the_same_losses(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    assert main([*FAST, "--out", str(out), "--resume"]) == 0
    one, two = logged(trained), logged(out)
    assert [entry["step"] for entry in two] == [1, 2, 3, 4]
    assert [by_group(entry) for entry in one] == [by_group(entry) for entry in two]
    assert (out / "history.jsonl").read_text() == (trained / "history.jsonl").read_text()


@pytest.mark.slow
def test_an_unpatched_run_has_the_losses_of_a_patched_one(trained: Path, tmp_path: Path) -> None:
    assert main([*FAST, "--out", str(tmp_path / "run"), "--unpatched"]) == 0
    for ours, theirs in zip(logged(trained), logged(tmp_path / "run"), strict=True):
        assert by_group(ours) == pytest.approx(by_group(theirs), abs=2e-4)
        assert ours["padding_saved"] == theirs["padding_saved"] > 0


def test_bare_prompts_of_captions_name_no_language() -> None:
    bare, named = world_words("bare"), world_words()
    annotations = held_out(SIZES["mini"], 1)[0].annotations
    captions = [one for one in annotations if one.task == "caption"]
    assert len(captions) == 6
    asked = [one.prompt for one in captions]
    prompts = set(map(tuple, bare.prompt_ids(asked)))
    assert len(prompts) == 1
    assert len(set(map(tuple, named.prompt_ids(asked)))) == 6
    (ids,) = prompts
    assert bare.prompts.unk_token_id not in ids
    assert bare.prompts.decode(ids, skip_special_tokens=True) == bare.caption_prompt
    translation = next(one for one in annotations if one.task == "translation")
    (ids,) = bare.prompt_ids([translation.prompt])
    said = bare.prompts.decode(ids, skip_special_tokens=True)
    assert said.startswith("The target language is German. Translate the following text: ")


@pytest.mark.slow
def test_a_bare_run_is_trained_and_measured_with_bare_prompts(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = fastvlm.caption

    def caption(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["prompt"])
        return original(*args, **kwargs)

    monkeypatch.setattr(fastvlm, "caption", caption)
    out = tmp_path / "run"
    begun = [*FAST, "--prompts", "bare", "--start-from", str(trained), "--out", str(out)]
    assert main(begun) == 0
    assert main(["florenz", "emergence", str(out), "--scenes", "1"]) == 0
    assert set(asked) == {"What does the image describe?"}
    assert main(["florenz", "emergence", str(trained), "--scenes", "1"]) == 0
    assert asked[-1] == "<CAPTION>"
    # settings of before there was a choice
    file = out / "settings.json"
    settings = json.loads(file.read_text())
    assert settings.pop("prompts") == "bare"
    file.write_text(json.dumps(settings))
    assert main([*begun, "--resume"]) == 2


@pytest.mark.slow
def test_the_decoder_from_scratch_trains_too(tmp_path: Path) -> None:
    assert main([*FAST, "--decoder", "scratch", "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "language_model").exists()
    assert main(["florenz", "emergence", str(tmp_path / "run"), "--scenes", "2"]) == 0


def test_the_losses_of_texts_do_not_depend_on_their_neighbours(trained: Path, words: Words) -> None:
    model = pretrained(str(trained), None, "cpu").model
    shown = held_out(SIZES["mini"], 3)
    alone = [losses(model, words, SIZES["mini"], [one]) for one in shown]
    counts = Counter(group_of(text) for text in shown[0].annotations)
    assert counts == {"SC": 2, "ST": 5, "UC": 4}
    together = losses(model, words, SIZES["mini"], shown)
    for name, value in together.items():
        assert value == pytest.approx(sum(one[name] for one in alone) / 3, abs=1e-5)


def test_a_tower_learns_what_pictures_show(words: Words) -> None:
    size = SIZES["mini"]
    config = config_of(size, "frozen", len(words.prompts) - 1, len(words.texts))
    torch.manual_seed(0)
    namer = Namer(FlorenzForConditionalGeneration(config).model, size.variety).train()
    data = Pictures(size, 8, seed=0)
    batch = picture_batch([data[number] for number in range(8)])
    two = labels_of(TWO)
    assert {LABELS[place] for place in two.nonzero().flatten().tolist()} == {
        ("ball", 0, "red"), ("ball", 1, 1), ("ball", 2, None), ("ball", 3, "left of"),
        ("cup", 0, "blue"), ("cup", 1, 2), ("cup", 2, None), ("cup", 3, "right of"),
    }  # fmt: skip
    namer.standardize(batch["pixel_values"])
    optimizer = torch.optim.AdamW(namer.parameters(), lr=1e-3)
    found = []
    for _ in range(80):
        output = namer(**batch)
        output["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(output["loss"].detach()))
    share = batch["labels"].mean(0).clamp(1e-6, 1 - 1e-6)
    # what a tower that sees nothing could reach: every label as often as it holds
    blind = float(-(share * share.log() + (1 - share) * (1 - share).log()).sum())
    assert found[-1] < 0.9 * blind < found[0]


def test_a_standardized_tower_tells_pictures_apart(words: Words) -> None:
    size = SIZES["tiny"]
    config = config_of(size, "frozen", len(words.prompts) - 1, len(words.texts))
    torch.manual_seed(0)
    namer = Namer(FlorenzForConditionalGeneration(config).model, size.variety).eval()
    data = Pictures(size, 64, seed=0)
    first, others = (
        picture_batch([data[number] for number in range(start, start + 32)])["pixel_values"]
        for start in (0, 32)
    )

    def spread() -> float:  # of features of norm 1 between pictures
        return float(namer.features(others).std(0).mean())

    with torch.no_grad():
        before = spread()
        namer.standardize(first)
        assert before < 0.2
        assert spread() > 0.6


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--steps", "0"], "--steps"),
        (["--accumulate", "x"], "--accumulate"),
    ],
)
def test_arguments_that_cannot_be_used(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*MINI, "--out", str(tmp_path / "run"), *more]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [["--size", "huge"], ["--languages", "3"], ["--decoder", "x"]])
def test_choices_that_there_are_not(more: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as found:
        main([*MINI, "--out", str(tmp_path / "run"), *more])
    assert found.value.code == 2


def test_folders_that_cannot_be_used(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, words in [
        (["--out", str(trained)], "new or empty"),
        (["--out", str(tmp_path), "--resume"], "settings.json"),
        (["--out", str(trained), "--resume", "--seed", "7"], "seed"),
        (["--out", str(tmp_path / "new"), "--start-from", str(tmp_path)], "the folder of a run"),
        (["--out", str(tmp_path / "new"), "--start-from", str(trained), "--size", "tiny"],
         "a run with size tiny"),
    ]:  # fmt: skip
        assert main([*FAST, *more]) == 2
        assert words in capsys.readouterr().err
    assert main(["florenz", "emergence", str(tmp_path)]) == 2
    assert "FOLDER" in capsys.readouterr().err


def test_a_run_starts_from_the_stages_of_another(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = [*FAST, "--seed", "3", "--start-from"]
    assert main([*begun, str(trained), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "step 4/4" in said
    assert "language model" not in said
    assert "vision tower" not in said
    ours, theirs = (load_file(out / "model.safetensors") for out in (tmp_path / "run", trained))
    frozen = [name for name in ours if ".vision_tower." in name]
    assert frozen
    assert all(torch.equal(ours[name], theirs[name]) for name in frozen)
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    for stage in ("language_model", "vision_tower"):
        file = other / stage / "model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert main([*begun, str(other), "--out", str(tmp_path / stage)]) == 2
        told = capsys.readouterr().err
        assert "--start-from" in told
        assert str(file) in told
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_named(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    file = out / "checkpoints" / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert main([*FAST, "--out", str(out), "--resume"]) == 2
    assert str(file) in capsys.readouterr().err
