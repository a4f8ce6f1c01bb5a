"""What a run measured: results.json, a picture, and a table of captions in six languages."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastvlm.florenz.training.emergence import (
    LOSSES,
    SEEN,
    UNSEEN,
    Shown,
    captions,
    losses,
    score,
)
from fastvlm.florenz.training.sizes import Size
from fastvlm.florenz.world.grammar import read
from fastvlm.tables import text_table

RESULTS, PICTURE, TABLE = "results.json", "emergence", "captions.html"
WITH, WITHOUT = "with the prefix", "without it"
_SHOWN = 12
_LANGUAGES = (*SEEN, *UNSEEN)


def evaluate(
    model: Any, processor: Any, words: Any, size: Size, shown: Sequence[Shown], out: Path,
    *, num_beams: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Caption the scenes with and without the prefix, and write the table of captions.

    Returns what results.json keeps: losses, and a `Score` by way and language.
    """
    scenes = [one.scene for one in shown]
    found: dict[str, Any] = {
        "scenes": len(shown), "beams": num_beams, "losses": losses(model, words, size, shown)
    }  # fmt: skip
    for way in (WITH, WITHOUT):
        rows = captions(
            model, processor, words.texts, shown, _LANGUAGES, prompt=words.caption_prompt,
            prefix=way == WITH, num_beams=num_beams,
        )  # fmt: skip
        columns = dict(zip(_LANGUAGES, zip(*rows)))
        found[way] = {c: asdict(score(scenes, texts, c)) for c, texts in columns.items()}
        if way == WITH:
            (out / TABLE).write_text(_page(shown[:_SHOWN], rows), encoding="utf-8")
    return found


def summary(found: dict[str, Any]) -> str:
    """The scores as a table to print."""
    rows = [
        (way, code, *(f"{found[way][code][name]:.0%}" for name in ("language", "objects", "exact")))
        for way in (WITH, WITHOUT)
        for code in _LANGUAGES
    ]
    table = text_table(("captions", "in", "asked language", "right objects", "exact"), rows)
    said = ", ".join(f"{name} {found['losses'][name]:.3f}" for name in LOSSES)
    return f"{table}\nlosses of {found['scenes']} scenes never trained on: {said}"


def unseen_mean(found: dict[str, Any], way: str, name: str) -> float:
    """The mean over the languages whose captions were never seen."""
    return sum(float(found[way][code][name]) for code in UNSEEN) / len(UNSEEN)


def save(out: Path, results: dict[str, Any]) -> list[Path]:
    """results.json and, where matplotlib is installed, the picture; the files written."""
    file = out / RESULTS
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        return [file, *_draw(out, results)]
    except ModuleNotFoundError:
        return [file]


def _draw(out: Path, results: dict[str, Any]) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = {"SC": "seen captioning", "ST": "seen translation", "UC": "unseen captioning"}
    steps = [look["step"] for look in results["history"]]
    for name in LOSSES:
        left.plot(steps, [look[name] for look in results["history"]], ".-", label=names[name])
    left.set(title="loss of scenes never trained on", xlabel="steps", yscale="log")
    plain = StrMethodFormatter("{x:.3g}")
    low, high = left.get_ylim()
    left.yaxis.set_major_formatter(plain)
    left.yaxis.set_minor_formatter(plain)
    if high > 10 * low:
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_minor_formatter(NullFormatter())
    left.grid(True, which="both", alpha=0.2)
    left.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, fontsize="small", frameon=False
    )
    found = results["emergence"]
    bars = ("language", "objects", "exact")
    for number, way in enumerate((WITH, WITHOUT)):
        shares = [100 * unseen_mean(found, way, name) for name in bars]
        places = [place + 0.38 * number for place in range(len(bars))]
        right.bar_label(right.bar(places, shares, 0.36, label=way), fmt="%.0f")
    right.set(
        title="captions in Fr, Es, Ru, Zh: none was seen", ylabel="%", ylim=(0, 108),
        xticks=[0.19, 1.19, 2.19], xticklabels=["asked language", "right objects", "exact"],
    )  # fmt: skip
    right.legend()
    paths = [out / f"{PICTURE}.svg", out / f"{PICTURE}.png"]
    for path in paths:
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return paths


def _page(shown: Sequence[Shown], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{code}</th>" for code in ("", *_LANGUAGES))
    body = "".join(_row(one, texts) for one, texts in zip(shown, rows))
    style = (
        "body{font:14px sans-serif}table{table-layout:fixed;width:100%;border-collapse:collapse}"
        "td,th{vertical-align:top;overflow-wrap:anywhere}td div{max-height:9em;overflow:auto}"
        "td,th{padding:6px;border-bottom:1px solid #ccc;text-align:left}"
        "img{width:96px;image-rendering:pixelated}.right{background:#e4f6e4}"
    )
    note = "Green: a sentence of the language that says what the picture shows."
    return (
        f"<!doctype html><meta charset=utf-8><title>Captions</title><style>{style}</style>"
        f"<p>{note}</p><table><tr>{head}</tr>{body}</table>\n"
    )


def _row(one: Shown, texts: Sequence[str]) -> str:
    content = io.BytesIO()
    one.picture.save(content, "PNG")
    source = base64.b64encode(content.getvalue()).decode()
    cells = [f'<td><img alt="" src="data:image/png;base64,{source}"></td>']
    for code, text in zip(_LANGUAGES, texts, strict=True):
        right = read(text, code).scene in (one.scene, one.scene.mirrored)
        cells.append(f"<td{' class=right' if right else ''}><div>{html.escape(text)}</div></td>")
    return f"<tr>{''.join(cells)}</tr>"
