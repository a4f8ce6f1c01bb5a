"""Measures on cases computed by hand, and a checkpoint evaluated from end to end."""

from __future__ import annotations

import json
import math
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import public_sets
import pytest
import sacrebleu
import torch
from pycocoevalcap.cider.cider import Cider
from torch.nn import functional as F

from fastvlm.__main__ import main
from fastvlm.decoding.pictures import open_picture
from fastvlm.florenz.evaluation import metrics, tokens
from fastvlm.florenz.evaluation.metrics import METRICS, Means
from fastvlm.florenz.evaluation.records import Answer, read_answers
from fastvlm.florenz.evaluation.report import measured
from fastvlm.florenz.evaluation.tokens import Missing

OWN = Means(words="words")


def given(*rows: tuple[str, list[str]], language: str = "en", **more: Any) -> list[Answer]:
    return [
        Answer(i, "x", language, text, tuple(refs), **more) for i, (text, refs) in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return public_sets.checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_cider_by_hand() -> None:
    # "a" is in both pictures' references: weight log(2 / 2) = 0; "b", "a b", "c", "a c" in one
    same = given(("A b.", ["a b"]), ("a c", ["a c"]))
    # one word and one pair agree, there are no longer ones: (1 + 1 + 0 + 0) / 4 * 10, in hundredths
    assert metrics.cider(same, "en", OWN) == pytest.approx(500)
    # "b" for "a b": the word agrees; lengths are counted in pairs, 0 and 1: exp(-1 / 2 / 6^2)
    short = given(("b", ["a b"]), ("a c", ["a c"]))
    wanted = 100 * (10 / 4 * math.exp(-1 / 72) + 5) / 2
    assert metrics.cider(short, "en", OWN) == pytest.approx(wanted)
    # of two references the mean, not the best
    two = given(("a b", ["a b", "d e"]), ("a c", ["a c"]))
    assert metrics.cider(two, "en", OWN) == pytest.approx(100 * (2.5 + 5) / 2)
    score, _ = Cider().compute_score({0: ["a b", "d e"], 1: ["a c"]}, {0: ["a b"], 1: ["a c"]})
    assert metrics.cider(two, "en", OWN) == pytest.approx(100 * score)


def test_bleu_and_chrf_by_hand() -> None:
    # 4 of 5 words, 3 of 4 pairs, 2 of 3, 1 of 2: their product is 0.2
    english = given(("a b c d e", ["a b c d f"]))
    assert metrics.bleu(english, "en", OWN) == pytest.approx(100 * 0.2**0.25)
    # characters: 4 of 5, 2 of 4, 1 of 3, none of 2 (half a match, as sacrebleu smooths)
    chinese = given(("红球在左边", ["红球在右边"]), language="zh")
    wanted = 100 * (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25
    assert metrics.bleu(chinese, "zh", OWN) == pytest.approx(wanted)
    # of captions by pycocoevalcap, as above but for its tiny addend
    assert metrics.bleu4(english, "en", OWN) == pytest.approx(100 * 0.2**0.25, rel=1e-4)
    # unequally many references: the best match of each
    several = given(("a b c d", ["x y z w", "a b c d"]), ("e f g h", ["e f g h"]))
    assert metrics.bleu(several, "en", OWN) == pytest.approx(100)
    reference = sacrebleu.corpus_bleu(
        ["a b c d", "e f g h"], [["x y z w", "e f g h"], ["a b c d", None]]
    )
    assert metrics.bleu(several, "en", OWN) == pytest.approx(reference.score)
    assert metrics.chrf(several, "en", OWN) == pytest.approx(100)
    assert metrics.chrf(given(("abc", ["xyz"])), "en", OWN) == pytest.approx(0)


def test_splits_and_languages_have_means() -> None:
    one = given(("a b c d", ["a b c d"]), split="one") + given(("x", ["a b c d"]), split="two")
    figures, _ = measured(one, ["chrf"], "multi30k-translation", OWN)
    assert figures == {"chrF": {"en": 50.0}}
    four = [one for code in ("de", "fr", "ru", "zh") for one in
            given(("abcd" if code == "de" else "xyz", ["abcd"]), language=code)]  # fmt: skip
    figures, _ = measured(four, ["chrf"], "commute", OWN)
    assert figures["chrF"]["X"] == 25.0
    assert "X" not in measured(four[:3], ["chrf"], "commute", OWN)[0]["chrF"]


@pytest.mark.turns(6)  # its tables of paraphrases take half a minute to read
def test_meteor_by_hand() -> None:
    # half of the words: precision and recall 1/2, one piece of one match: the penalty is 0.6
    # (METEOR 1.5's parameters for English), so 1/2 * (1 - 0.6)
    half = given(("red ball", ["red cup", "black cup"]))
    if shutil.which("java") is None:
        with pytest.raises(Missing, match="java is not installed"):
            metrics.meteor(half, "en", OWN)
        return
    assert metrics.meteor(half, "en", OWN) == pytest.approx(20, abs=0.5)


def test_meteor_is_called_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public_sets.lines(tmp_path / "meteor-1.5.jar", "")
    public_sets.lines(tmp_path / "data" / "paraphrase-de.gz", "")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    seen: list[Any] = []

    def done(command: list[str], **kwargs: Any) -> Any:
        files = [Path(part).read_text(encoding="utf-8") for part in command[5:7]]
        seen.append((command[7:], files))
        said = "Final score:            0.25" if len(seen) == 1 else "no memory"
        return types.SimpleNamespace(returncode=len(seen) - 1, stdout=said, stderr="")

    monkeypatch.setattr(metrics.subprocess, "run", done)
    means = Means(meteor=str(tmp_path))
    rows = given(("ein\nBall", ["der Ball"]), ("zwei", ["zwei Tassen", "beide"]), language="de")
    assert metrics.meteor(rows, "de", means) == pytest.approx(25)
    # unequally many references: one stands twice
    files = ["ein Ball\nzwei\n", "der Ball\nder Ball\nzwei Tassen\nbeide\n"]
    assert seen == [(["-r", "2", "-l", "de", "-norm"], files)]
    with pytest.raises(Missing, match=r"without a score \(no memory\)"):
        metrics.meteor(rows, "de", means)
    with pytest.raises(Missing, match=r"no data/paraphrase-zh\.gz"):
        metrics.meteor(rows, "zh", means)
    with pytest.raises(Missing, match=r"no meteor-1\.5\.jar in"):
        metrics.meteor(rows, "de", Means(meteor=str(tmp_path / "none")))


def test_words() -> None:
    assert tokens.words(["Der Ball, links!", "Un ballon d'eau", "红球。3 个"]) == [
        "der ball links", "un ballon d'eau", "红 球 3 个"
    ]  # fmt: skip
    texts = ["A red ball, on the left.", "Two cups"]
    if shutil.which("java") is None:
        with pytest.raises(Missing, match="java is not installed"):
            tokens.tokenized(texts, "ptb", "en")
        return
    assert tokens.tokenized(texts, "ptb", "en") == ["a red ball on the left", "two cups"]


def test_what_is_not_here_is_said_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    some = given(("a b", ["a b"])) + given(("a b", ["a b"]), language="zh")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    figures, missing = measured(some, ["cider", "chrf", "meteor"], "coco", Means())
    assert set(figures) == {"chrF"}
    assert {name: set(codes) for name, codes in missing.items()} == {
        "CIDEr": {"en", "zh"}, "METEOR": {"en", "zh"}
    }  # fmt: skip
    assert all("java is not installed" in why for why in missing["CIDEr"].values())
    for package, metric, words in [
        ("sacrebleu", "bleu", "sacrebleu is not installed"),
        ("pycocoevalcap.cider.cider", "cider", "pycocoevalcap is not installed"),
        ("comet", "comet", "unbabel-comet is not installed"),
    ]:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(Missing, match=words):
            METRICS[metric].measure(some[:1], "en", OWN)
    monkeypatch.setitem(sys.modules, "stanza", None)
    with pytest.raises(Missing, match="stanza is not installed"):
        tokens.tokenized(["a"], "stanza", "fr")
    with pytest.raises(Missing, match="CLIP reads English"):
        metrics.clipscore(some, "de", OWN)


def test_comet_gets_source_text_and_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Scorer:
        def predict(self, rows: Any, **kwargs: Any) -> Any:
            seen.append(rows)
            return types.SimpleNamespace(system_score=0.83)

    fake: Any = types.ModuleType("comet")
    fake.download_model = lambda name: f"/{name}"
    fake.load_from_checkpoint = lambda path: Scorer()
    monkeypatch.setitem(sys.modules, "comet", fake)
    rows = given(("ein Ball", ["ein Ball!"]), language="de", source="a ball")
    assert metrics.comet(rows, "de", OWN) == pytest.approx(83)
    assert seen == [[{"src": "a ball", "mt": "ein Ball", "ref": "ein Ball!"}]]
    with pytest.raises(Missing, match="of translations"):
        metrics.comet(given(("a", ["a"])), "en", OWN)


def test_an_evaluation_from_end_to_end(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    short = ["--beams", "2", "--new-tokens", "3"]
    command = ["florenz", "evaluate", str(folder), "--set", "world", "--limit", "3", *short]
    assert main([*command, "--metrics", "cider,b@4", "--out", str(out)]) == 0
    results = json.loads((out / "evaluation.json").read_text())
    assert set(results["figures"]) == {"CIDEr", "B@4", "in the language", "right things", "exact"}
    assert all(len(by_language) == 6 for by_language in results["figures"].values())
    assert (results["items"], results["beams"], results["cider_words"]) == (3, 2, "words")
    kept = read_answers(out / "answers.jsonl")
    assert len(kept) == 18
    table = capsys.readouterr().out.splitlines()
    shown = next(line for line in table if line.startswith("CIDEr")).split()[1:]
    assert shown == [f"{value:.1f}" for value in results["figures"]["CIDEr"].values()]
    assert [line.split()[2:] for line in table if "world" in line] == [list(results["languages"])]
    # an answer that is right counts, and nothing else of what was measured is lost
    right = [Answer(**{**vars(one), "text": one.references[0]}) for one in kept]
    (out / "answers.jsonl").write_text("".join(json.dumps(vars(one)) + "\n" for one in right))
    again = ["florenz", "evaluate", "--answers", str(out), "--metrics", "b@4", "--out", str(out)]
    assert main(again) == 0
    after = json.loads((out / "evaluation.json").read_text())
    assert after["figures"]["B@4"] == dict.fromkeys(results["figures"]["B@4"], pytest.approx(100))
    assert after["figures"]["exact"] == results["figures"]["exact"]
    assert after["figures"]["CIDEr"] == results["figures"]["CIDEr"]
    ptb = ["--cider-words", "ptb", "--metrics"]
    assert main([*again[:4], *ptb, "clipscore", "--out", str(out)]) == 0  # of drawn pictures: none
    last = json.loads((out / "evaluation.json").read_text())
    assert last["figures"] == after["figures"]
    assert (last["cider_words"], set(last["missing"])) == ("words", {"CLIPScore"})
    assert main([*command, "--out", str(out)]) == 2
    assert "--out wants a folder without an evaluation" in capsys.readouterr().err


def test_a_public_set_lies_beside_the_papers_figures(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = public_sets.commute(tmp_path / "set")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    command = ["florenz", "evaluate", str(folder), "--set", "commute", "--data", str(root)]
    command += ["--beams", "1", "--new-tokens", "2"]
    assert main(command) == 0
    told = capsys.readouterr().out
    row = next(line for line in told.splitlines() if line.startswith("paper, 3.5B, fine-tuned"))
    assert {"32.0", "61.3", "62.6"} <= set(row.split())
    assert "not measured: METEOR de, zh: java is not installed" in told
    assert main([*command, "--metrics", "meteor"]) == 2
    assert "meteor: java is not installed" in capsys.readouterr().err


def test_clipscore_of_a_small_clip(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    from fastvlm.compat import hf

    letters = [*"abcdefghij", *(f"{letter}</w>" for letter in "abcdefghij")]
    words = {w: i for i, w in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "projection_dim": 8}  # fmt: skip
    text = {**small, "vocab_size": len(words), "bos_token_id": 20, "eos_token_id": 21}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16},
                   projection_dim=8)
    ).eval()  # fmt: skip
    pictures = hf.clip_image_processor()(size={"shortest_edge": 32}, crop_size=32)
    tokenizer = CLIPTokenizerFast(
        vocab_file=str(tmp_path / "vocab.json"), merges_file=str(tmp_path / "merges.txt")
    )
    processor = CLIPProcessor(pictures, tokenizer)
    image = public_sets.picture(tmp_path / "picture.png")
    rows = [Answer(i, str(image), "en", text, ("x",)) for i, text in enumerate(("a b", "j"))]
    inputs = processor(
        text=[one.text for one in rows], images=[open_picture(str(image))], return_tensors="pt",
        padding=True,
    )  # fmt: skip
    with torch.no_grad():
        output = model(**inputs)
    cosines = F.cosine_similarity(output.image_embeds, output.text_embeds)
    found = []
    for number, sign in enumerate((1, -1)):
        clip = tmp_path / f"clip{number}"
        model.visual_projection.weight.data.mul_(sign)
        model.save_pretrained(clip)
        processor.save_pretrained(clip)
        means = Means(clip=str(clip))
        wanted = 250 * float((sign * cosines).clamp(min=0).mean())
        found.append(metrics.clipscore(rows, "en", means))
        assert found[-1] == pytest.approx(wanted, rel=1e-4)
    assert max(found) > min(found)
    with pytest.raises(Missing, match="CLIP does not load"):
        metrics.clipscore(rows, "en", Means(clip=str(tmp_path / "none")))
    with pytest.raises(Missing, match="no files here"):
        metrics.clipscore(given(("a", ["a"])), "en", means)
