"""One HTML page of a job, nothing outside of it: pictures, what was said, what failed."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastvlm.captioning.draw import COLOURS, shapes
from fastvlm.captioning.ledger import read_lines
from fastvlm.captioning.sources import Item, Source
from fastvlm.decoding.pictures import PictureError, open_picture

# a page of more is too large to be looked at; it says how many are left out
MOST_PICTURES, MOST_ERRORS = 120, 500
_SIDE = 360

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1280px; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.4rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2.2rem }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin: .8rem 0 1.2rem; padding: 0 }
.facts div { border-left: 3px solid #0072B2; padding-left: .6rem } .facts b { display: block }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden }
figure svg { display: block; width: 100%; height: auto; background: var(--soft) }
figcaption { padding: .6rem .8rem } .path { font-size: .82em; opacity: .75; word-break: break-all }
.said { margin: .4rem 0 0 } .said small { opacity: .75 } .tag { border: 1px solid var(--line);
  border-radius: 4px; padding: 0 .35em; font-size: .8em; margin-right: .35em; white-space: nowrap }
table { border-collapse: collapse } td, th { text-align: left; padding: .2rem 1rem .2rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top }
.chart { max-width: 760px; width: 100% }
"""


def write_page(
    path: Path,
    source: Source,
    out: Path,
    facts: dict[str, str],
    points: Sequence[tuple[float, int]],
) -> None:
    """facts: shown on top, by name. points: seconds and pictures done by then, of this run."""
    shown: dict[str, list[dict[str, Any]]] = {}
    errors: dict[tuple[str, str], None] = {}
    pictures: set[int] = set()
    answers = 0
    for _, line in read_lines(out):
        name = line["path"]
        if "error" in line:
            errors[name, line["error"]] = None
            continue
        answers += 1
        pictures.add(hash(name))
        if name in shown or len(shown) < MOST_PICTURES:
            shown.setdefault(name, []).append(line)
    facts = {
        "photos described": f"{len(pictures):,}", "answers": f"{answers:,}",
        "could not be read": f"{len({name for name, _ in errors}):,}", **facts,
    }  # fmt: skip
    new = path.with_name(f".{path.name}.new")
    try:
        with open(new, "w", encoding="utf-8", errors="replace") as file:
            for part in _page(source, facts, points, shown, len(pictures), list(errors)):
                file.write(part)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _page(
    source: Source,
    facts: dict[str, str],
    points: Sequence[tuple[float, int]],
    shown: dict[str, list[dict[str, Any]]],
    pictures: int,
    errors: list[tuple[str, str]],
) -> Iterable[str]:
    """Part by part, so that the pictures are never in memory together."""
    yield "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    yield f"<title>fastvlm caption</title><style>{_STYLE}</style></head><body>"
    yield "<h1>What was said of these photos</h1><div class='facts'>"
    for name, value in facts.items():
        yield f"<div><b>{_text(value)}</b>{_text(name)}</div>"
    yield "</div>"
    yield _chart(points)
    yield "<h2>Photos</h2>"
    if len(shown) < pictures:
        yield f"<p>The first {len(shown):,} of {pictures:,}.</p>"
    yield "<div class='photos'>"
    left = dict(shown)
    for item in source.items():
        if not left:
            break
        if (said := left.pop(item.path, None)) is not None:
            yield _photo(item, said)
    yield "</div>"
    if errors:
        yield "<h2>What could not be read or described</h2>"
        if len(errors) > MOST_ERRORS:
            yield f"<p>The first {MOST_ERRORS:,} of {len(errors):,}.</p>"
        yield "<table><tr><th>photo</th><th>why</th></tr>"
        for name, why in errors[:MOST_ERRORS]:
            yield f"<tr><td class='path'>{_text(name)}</td><td>{_text(why)}</td></tr>"
        yield "</table>"
    yield "</body></html>\n"


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _photo(item: Item, said: list[dict[str, Any]]) -> str:
    parts = ["<figure>", _picture(item, said), "<figcaption>"]
    parts.append(f"<div class='path'>{_text(item.path)}</div>")
    for line in said:
        tags = [line["task"]] + ([line["language"]] if line["language"] else [])
        marks = "".join(f"<span class='tag'>{_text(tag)}</span>" for tag in tags)
        language = f" lang='{_text(line['language'])}'" if line["language"] else ""
        found = shapes(line)
        text = ", ".join(label or "without a name" for _, label in found) if found else line["text"]
        parts.append(
            f"<p class='said'>{marks}<span dir='auto'{language}>{_text(text)}</span> "
            f"<small>{line['score']:.2f}</small></p>"
        )
    return "".join([*parts, "</figcaption></figure>"])


def _picture(item: Item, said: list[dict[str, Any]]) -> str:
    """The picture, small, under what was found in it."""
    try:
        picture = open_picture(io.BytesIO(item.read()))
    except (OSError, PictureError) as error:
        return f"<p class='said'>not there any more: {_text(str(error))}</p>"
    width, height = picture.size
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    parts = [
        f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{_text(item.path)}'>"
        f"<image width='{width}' height='{height}' href='data:image/jpeg;base64,{data}'/>"
    ]
    pen, size = max(1, min(width, height) / 150), max(6, min(width, height) / 18)
    found = [shape for line in said for shape in shapes(line)]
    for index, (lines, label) in enumerate(found):
        colour = COLOURS[index % len(COLOURS)]
        for line in lines:
            points = " ".join(f"{line[i]},{line[i + 1]}" for i in range(0, len(line) - 1, 2))
            parts.append(
                f"<polygon points='{points}' fill='none' stroke='{colour}' "
                f"stroke-width='{pen:.1f}'/>"
            )
        if label and lines:
            x, y = min(lines[0][0::2]), min(lines[0][1::2])
            y = y - pen if y > size else y + size
            parts.append(
                f"<text x='{x}' y='{y:.0f}' font-size='{size:.0f}' fill='{colour}' "
                f"stroke='#000' stroke-width='{size / 8:.1f}' paint-order='stroke'>"
                f"{_text(label)}</text>"
            )
    return "".join([*parts, "</svg>"])


def _chart(points: Sequence[tuple[float, int]]) -> str:
    """Photos a second between the points, over the time of this run."""
    rates = [
        ((a[0] + b[0]) / 2, (b[1] - a[1]) / (b[0] - a[0]))
        for a, b in pairwise(points)
        if b[0] > a[0]
    ]
    if not rates or not points[-1][1]:
        return ""
    end, top = points[-1][0], max(rate for _, rate in rates)
    mean = points[-1][1] / end
    wide, high, left, below = 720, 170, 52, 34

    def x(seconds: float) -> float:
        return left + (wide - left - 8) * seconds / end

    def y(rate: float) -> float:
        return 10 + (high - below - 10) * (1 - rate / top)

    line = " ".join(f"{x(at):.1f},{y(rate):.1f}" for at, rate in rates)
    dots = "".join(
        f"<circle cx='{x(at):.1f}' cy='{y(rate):.1f}' r='2.5' fill='#0072B2'/>"
        for at, rate in (rates if len(rates) <= 60 else [])
    )
    unit, scale = ("s", 1) if end < 300 else ("min", 60) if end < 18000 else ("h", 3600)
    return (
        f"<h2>Photos a second, this run</h2><svg class='chart' viewBox='0 0 {wide} {high}' "
        "fill='currentColor' font-size='12'>"
        f"<path d='M{left} 10V{high - below}H{wide - 8}' fill='none' stroke='#888'/>"
        f"<path d='M{left} {y(mean):.1f}H{wide - 8}' stroke='#888' stroke-dasharray='4 4'/>"
        f"<polyline points='{line}' fill='none' stroke='#0072B2' stroke-width='2'/>{dots}"
        f"<text x='{left - 6}' y='16' text-anchor='end'>{top:.3g}</text>"
        f"<text x='{left - 6}' y='{high - below}' text-anchor='end'>0</text>"
        f"<text x='{wide - 10}' y='{y(mean) - 5:.1f}' text-anchor='end'>mean {mean:.3g}</text>"
        f"<text x='{left}' y='{high - 12}'>0</text>"
        f"<text x='{wide - 8}' y='{high - 12}' text-anchor='end'>{end / scale:.3g} {unit}</text>"
        "</svg>"
    )
