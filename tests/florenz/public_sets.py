"""Small files of ours in the formats of the public sets, and a checkpoint without training."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
from PIL import Image

from fastvlm.florenz import FlorenzForConditionalGeneration
from fastvlm.florenz.training.batches import world_words
from fastvlm.florenz.training.saving import save_model
from fastvlm.florenz.training.sizes import SIZES, config_of
from fastvlm.loading.processors import square

COLOURS = ("red", "blue", "green")


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32), colour).save(path)
    return path


def lines(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{text}\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def checkpoint(folder: Path) -> Path:
    """A model of size mini with random weights, as florenz train leaves one."""
    torch.manual_seed(0)
    words, size = world_words(), SIZES["mini"]
    config = config_of(size, "frozen", len(words.prompts) - 1, len(words.texts))
    model = FlorenzForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("encoder_attn_gate"):  # begins at 0, and would hide the picture
            parameter.data.fill_(1.0)
    save_model(model, square(words.prompts, size.pixels), words.texts, folder)
    (folder / "settings.json").write_text(json.dumps({"size": "mini"}))
    return folder


def multi30k(root: Path) -> Path:
    """Both tasks, in the folders of the public repository: two pictures each."""
    for name, colour in zip(("1.jpg", "2.jpg"), COLOURS):
        picture(root / "images" / name, colour)
    one, two = root / "data" / "task1", root / "data" / "task2"
    lines(one / "image_splits" / "test_2016_flickr.txt", "1.jpg", "2.jpg")
    lines(one / "raw" / "test_2016_flickr.en.gz", "There is a red ball.", "There are two cups.")
    lines(one / "raw" / "test_2016_flickr.de.gz", "Da ist ein roter Ball.", "Da sind zwei Tassen.")
    lines(one / "raw" / "test_2016_flickr.fr.gz", "Il y a un ballon.", "Il y a deux tasses.")
    lines(two / "image_splits" / "test_2016_images.txt", "2.jpg", "1.jpg")
    for n in range(1, 6):
        lines(two / "raw" / f"test_2016.{n}.en.gz", f"Two cups, {n}.", f"A ball, {n}.")
        lines(two / "raw" / f"test_2016.{n}.de.gz", f"Zwei Tassen, {n}.", f"Ein Ball, {n}.")
    return root


def commute(root: Path) -> Path:
    for name, colour in zip(("a.jpeg", "b.png"), COLOURS):
        picture(root / "images" / name, colour)
    for code, right, wrong in (("de", "Die Bank.", "Das Ufer."), ("zh", "银行。", "河岸。")):
        lines(root / f"en-{code}" / "src.en", "The bank.", "The bank.")
        lines(root / f"en-{code}" / f"correct.{code}", right, wrong)
        lines(root / f"en-{code}" / f"incorrect.{code}", wrong, right)
        (root / f"en-{code}" / "img.order").write_text("a.jpeg\nb.png")  # published without an end
    return root


def xm3600(root: Path) -> Path:
    records = []
    for key, colour in zip(("00a", "00b"), COLOURS):
        picture(root / "images" / f"{key}.jpg", colour)
        texts = {c: {"caption": [f"{c} {key} one", f"{c} {key} two"], "caption/tokenized": ["x"]}
                 for c in ("en", "de", "fr", "es", "ru", "zh", "mi")}  # fmt: skip
        records.append(json.dumps({"image/key": key, "image/locale": "de", **texts}))
    lines(root / "captions.jsonl", *records)
    return root


def coco(root: Path) -> Path:
    images = []
    for number, (split, folder) in enumerate((("train", "train2014"), ("test", "val2014"))):
        name = f"COCO_{folder}_{number:012d}.jpg"
        picture(root / folder / name, COLOURS[number])
        texts = [{"raw": f"A picture {i} of {split}.", "tokens": []} for i in range(number + 2)]
        images.append({"filepath": folder, "filename": name, "split": split, "sentences": texts,
                       "cocoid": number})  # fmt: skip
    (root / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return root
