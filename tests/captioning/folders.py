"""Folders of small pictures, and the command on them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvlm.__main__ import main

QUICK = ["--small", "--new-tokens", "4", "--beams", "2", "--quiet"]


def noise(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def fill(folder: Path, count: int) -> Path:
    """Pictures of many sizes, some of them in folders below."""
    for seed in range(count):
        path = folder / ("", "b/", "b/c/")[seed % 3] / f"p{seed:03}.{('png', 'jpg')[seed % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(seed, 30 + seed, 64 - seed % 20).save(path)
    return folder


def shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A WebDataset shard: by key, the members by suffix."""
    with tarfile.open(path, "w") as opened:
        for key, members in samples.items():
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                opened.addfile(info, io.BytesIO(data))
    return path


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def run(source: Any, out: Any, *options: str) -> int:
    return main(["caption", str(source), "--out", str(out), *QUICK, *options])


def lines(out: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out).read_text().splitlines()]


def keys(out: Any) -> list[tuple[str, str, str | None]]:
    return [(line["path"], line["task"], line["language"]) for line in lines(out)]


def texts(out: Any) -> dict[tuple[str, str, str | None], str]:
    """What each line says, without the score, which rounds otherwise in another batch."""
    found = {}
    for line in lines(out):
        line.pop("score", None)
        found[line["path"], line["task"], line["language"]] = json.dumps(line, sort_keys=True)
    return found
