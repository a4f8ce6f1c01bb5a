"""What a model writes is what fastvlm.caption writes; what it chooses is what its loss says."""

from __future__ import annotations

from pathlib import Path

import public_sets
import pytest
import torch
from torch.nn import functional as F

import fastvlm
from fastvlm.captioning.models import Loaded, pretrained
from fastvlm.decoding.pictures import open_picture
from fastvlm.florenz.data.annotations import marked_prompt, spelled_prompt
from fastvlm.florenz.data.public import READERS
from fastvlm.florenz.evaluation import metrics
from fastvlm.florenz.evaluation.answers import Writing, answers
from fastvlm.florenz.evaluation.metrics import Means
from fastvlm.florenz.evaluation.records import Answer
from fastvlm.florenz.evaluation.tokens import Missing
from fastvlm.florenz.evaluation.world import world_captions, world_translations
from fastvlm.florenz.training.sizes import SIZES
from fastvlm.florenz.world import PREFIXES, read


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = public_sets.checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return pretrained(str(folder), None, "cpu")


def test_captions_are_those_of_caption(loaded: Loaded, tmp_path: Path) -> None:
    asked = READERS["xm3600"](public_sets.xm3600(tmp_path), None, "", None)
    found = list(answers(loaded, asked, Writing(beams=2, new_tokens=4)))
    pictures = [str(item.image) for item in asked.items]
    wanted = fastvlm.caption(
        loaded.model, loaded.processor, pictures, asked.languages, tokenizer=loaded.tokenizer,
        num_beams=2, max_new_tokens=4,
    )  # fmt: skip
    assert [(one.item, one.language, one.text) for one in found] == [
        (one.image, one.language, one.text) for one in wanted
    ]
    assert len({one.text for one in found}) > 2
    assert found[0].references == ("en 00a one", "en 00a two")
    bare = list(answers(loaded, asked, Writing(beams=2, new_tokens=4, prefix=False)))
    assert [one.text for one in bare] != [one.text for one in found]


def loss_of(loaded: Loaded, image: Path, code: str, source: str, text: str) -> float:
    """Of one text alone, by the model's own loss."""
    prompts, texts = loaded.processor.tokenizer, loaded.tokenizer
    prompt = spelled_prompt(marked_prompt(code, "<TRANSLATE>", source))
    ids = prompts(f"<s>{prompt}</s>", add_special_tokens=False)["input_ids"]
    pixels = loaded.processor.image_processor(
        images=[open_picture(str(image))], return_tensors="pt"
    )["pixel_values"]
    image_ids = [loaded.model.config.image_token_id] * SIZES["mini"].image_tokens
    labels = [2, *texts(text, add_special_tokens=False)["input_ids"], 1]
    with torch.no_grad():
        logits = loaded.model(
            input_ids=torch.tensor([image_ids + ids]), pixel_values=pixels,
            decoder_input_ids=torch.tensor([[1, *labels[:-1]]]),
        ).logits  # fmt: skip
    return float(F.cross_entropy(logits[0], torch.tensor(labels)))


def test_the_likelier_translation_is_chosen(loaded: Loaded, tmp_path: Path) -> None:
    root = public_sets.commute(tmp_path)
    texts = ("Zu sehen ist ein roter Ball.", "Man sieht zwei blaue Tassen unter einem Haus.")
    for name, rows in (("correct", texts), ("incorrect", texts[::-1])):
        public_sets.lines(root / "en-de" / f"{name}.de", *rows)
    asked = READERS["commute"](root, None, "", ["de"])
    found = list(answers(loaded, asked, Writing(beams=1, new_tokens=3)))
    for one, item in zip(found, asked.items, strict=True):
        right, wrong = (
            loss_of(loaded, item.image, "de", "The bank.", text)
            for text in (item.references["de"][0], item.wrong["de"])
        )
        assert one.right is (right < wrong)
    assert metrics.accuracy(found, "de", Means()) == 50  # each of the two is right once
    with pytest.raises(Missing):
        metrics.accuracy([Answer(0, "x", "en", "a", ("a",))], "en", Means())


def test_translations_are_of_their_own_source(loaded: Loaded) -> None:
    asked = world_translations(SIZES["mini"], 2)
    assert asked.languages == ["de", "es", "fr", "ru", "zh"]
    item = asked.items[0]
    assert item.source
    assert read(item.references["de"][0], "de").scene == read(item.source, "en").scene
    (one,) = (a for a in answers(loaded, asked, Writing(beams=2, new_tokens=4)) if a.item == 0)
    prompt = spelled_prompt(marked_prompt("de", "<TRANSLATE>", item.source))
    (wanted,) = fastvlm.caption(
        loaded.model, loaded.processor, [item.image], ["de"], tokenizer=loaded.tokenizer,
        prompt={"de": prompt}, prefixes={"de": ""}, num_beams=2, max_new_tokens=4,
    )  # fmt: skip
    assert (one.text, one.source) == (wanted.text, item.source)


def test_references_of_the_world_are_right() -> None:
    asked = world_captions(SIZES["tiny"], 6)
    for item, scene in zip(asked.items, asked.scenes, strict=True):
        assert len(item.references) == 6
        for code, texts in item.references.items():
            assert all(text.startswith(PREFIXES[code]) for text in texts)
            assert all(read(text, code).scene in (scene, scene.mirrored) for text in texts)
    assert {len(item.references["en"]) for item in asked.items} == {1, 2}
