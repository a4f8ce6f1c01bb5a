"""``python -m fastvlm caption``: random weights, checkpoints made here, and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from speakers import BART, Speaker, florence2_processor, picture, speaker, tokenizer
from transformers import Florence2Processor

import fastvlm
from fastvlm.__main__ import main
from fastvlm.captioning.models import invented_tokenizer


def photos(folder: Path) -> list[str]:
    paths = [str(folder / f"{seed}.png") for seed in (1, 2)]
    for seed, path in zip((1, 2), paths):
        picture(seed).save(path)
    return paths


def test_random_weights_say_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, second = photos(tmp_path)
    options = ["--small", "--new-tokens", "5", "--beams", "2", "--lang", "en, zh"]
    assert main(["caption", *options, "--image", first, "--image", second]) == 0
    out, err = capsys.readouterr()
    assert "the text means nothing" in err
    assert "random weights, 2 beams" in out
    rows = [line.split()[:2] for line in out.splitlines() if ".png" in line]
    assert rows == [[name, code] for name in ("1.png", "2.png") for code in ("en", "zh")]


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--small", "--new-tokens", "5", "--lang", "ru,en", "--json", "--keep-prefix"]
    assert main(["caption", *options]) == 0
    given = json.loads(capsys.readouterr().out)
    assert given["weights"] == "random"
    ru, en = given["captions"]
    assert (ru["image"], ru["language"], en["language"]) == ("astronaut.png", "ru", "en")
    assert ru["text"].startswith("На картинке изображен")  # noqa: RUF001 (it is Cyrillic)
    assert en["text"].startswith("The image shows")
    assert len(en["tokens"]) == 5
    assert en["score"] < 0


def saved(told: Speaker, folder: Path) -> Any:
    """The checkpoint of a speaker; returns its processor."""
    told.model.save_pretrained(folder)
    if told.tokenizer is None:
        processor = florence2_processor()
    else:
        words = tokenizer(len(told.processor.tokenizer), BART, image_token="<image>")
        processor = Florence2Processor(told.processor.image_processor, words)
        told.tokenizer.save_pretrained(folder / "decoder_tokenizer")
    processor.save_pretrained(folder)
    return processor


@pytest.mark.parametrize("kind", ["florence2", "florenz-bart", "florenz-gemma"])
def test_a_checkpoint_writes_what_caption_writes(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = speaker(kind)
    folder = tmp_path / "model"
    processor = saved(told, folder)
    paths = photos(tmp_path)
    images = [word for path in paths for word in ("--image", path)]
    options = ["--model", str(folder), "--lang", "de,zh", "--new-tokens", "6", "--beams", "2"]
    assert main(["caption", *options, *images, "--json"]) == 0
    out, err = capsys.readouterr()
    given = json.loads(out)
    assert given["weights"] == "real"
    assert "means nothing" not in err
    want = fastvlm.caption(
        told.model,
        processor,
        paths,
        ["de", "zh"],
        tokenizer=told.tokenizer,
        num_beams=2,
        max_new_tokens=6,
    )
    assert [c["text"] for c in given["captions"]] == [c.text for c in want]
    assert [tuple(c["tokens"]) for c in given["captions"]] == [c.tokens for c in want]


def test_a_florenz_tokenizer_may_lie_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = speaker("florenz-bart")
    saved(told, tmp_path / "model")
    (tmp_path / "model" / "decoder_tokenizer").rename(tmp_path / "words")
    options = ["--model", str(tmp_path / "model"), "--lang", "de", "--new-tokens", "3"]
    assert main(["caption", *options]) == 2
    assert "--tokenizer wants one" in capsys.readouterr().err
    assert main(["caption", *options, "--tokenizer", str(tmp_path / "words")]) == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--image", "missing.png"], ["--image", "missing.png", "No such file"]),
        (["--lang", "en,xx"], ["--lang", "en,de,fr,es,ru,zh", "'en,xx'"]),
        (["--lang", ","], ["--lang", "','"]),
        (["--beams", "0"], ["--beams", "at least 1", "got 0"]),
        (["--new-tokens", "many"], ["--new-tokens", "at least 1", "'many'"]),
        (["--tokenizer", "words"], ["--tokenizer", "--model beside it", "words"]),
        (["--model", "somewhere"], ["--small", "no --model beside it", "somewhere"]),
    ],
)
def test_bad_argument_is_one_line(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", "--small", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    for part in ("fastvlm caption: ", *parts):
        assert part in err


def test_a_model_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for folder in (tmp_path, tmp_path / "nothing"):
        assert main(["caption", "--model", str(folder)]) == 2
        err = capsys.readouterr().err
        assert "caption: --model wants a Florence-2 or Florenz model" in err
        assert str(folder) in err


def test_invented_words_spell_any_text_and_are_all_different() -> None:
    words = invented_tokenizer(3000)
    assert len(words) == 3000
    for text in ("The image shows", "图为"):
        ids = words(text, add_special_tokens=False).input_ids
        assert words.decode(ids) == text
    assert len({words.decode([token]) for token in range(260, 3000)}) == 2740
    with pytest.raises(ValueError, match="size must be 260 or more; got 8"):
        invented_tokenizer(8)


def test_the_package_does_not_need_transformers_to_be_imported() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; import fastvlm; import fastvlm.decoding; "
        "assert 'caption' in fastvlm.__all__; "
        "from fastvlm.decoding.languages import LANGUAGES; print(len(LANGUAGES))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "6"
