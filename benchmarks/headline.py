"""``python -m benchmarks.headline``: the tables of README and docs/benchmarks.md, whole jobs first,
from the results files.

Each row is a range over all kept runs on a CPU: how many times as fast as transformers (sdpa, or
eager for Florenz) fastvlm was in the same run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- figures: python -m benchmarks.headline -->\n"
END = "<!-- end of figures -->\n"
BASE = "Florence-2-base"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Ratio:
    """One measured ratio: of which work, and in which run."""

    work: str
    ratio: float
    run: Figures


WHOLE = "one caption, Florence-2-base, a photo of 768 px, 3 beams, whole call"
BATCH = "four captions at once, the same"
LANGUAGES = "one photo in six languages, 4 beams each"
LONG = "a fine-tuning step at 768 px, batch of 4, vision tower frozen"
SHORT = "a fine-tuning step at 224 px, batch of 8"
KEPT = "the same from the second epoch on, the tower's features kept on disk"
AUTOCAST = {
    LONG: "the step at 768 px, both under bfloat16 autocast",
    SHORT: "the step at 224 px, both under bfloat16 autocast",
}
FLORENZ = "a training step of Florenz at 224 px, one target to an image"
TARGETS = "the same with six targets to an image, by samples a second"
QUICK = "one caption, `weights` and `compute` int8"
ROUNDED = "one caption, `weights` and `compute` bf16"
HALF = "one caption of a model in bfloat16, against it"
STEP = "a decoding step of Florence-2-base, 3 beams"
STORED = {None: STEP, "bf16": 'the same, `weights="bf16"`', "int8": 'the same, `weights="int8"`'}
FAMILIES = {
    "Whisper-small": "a decoding step of Whisper-small, 5 beams",
    "Flan-T5-base, 512": "the same of Flan-T5-base, 4 beams",
    "NLLB-600M": "eight sentences through NLLB-600M, 4 beams, whole call",
}
ROWS = (
    *(WHOLE, BATCH, QUICK, ROUNDED, HALF, LANGUAGES, LONG, KEPT, SHORT, *AUTOCAST.values()),
    *(FLORENZ, TARGETS),
    *STORED.values(),
    *FAMILIES.values(),
)
# README's: what most people run
FIRST = (WHOLE, QUICK, LONG, KEPT, FLORENZ)
_JOBS = {"one photo": WHOLE, "photos": BATCH, "step": LONG, "step, small images": SHORT}


def _runs(folder: Path, name: str) -> Iterator[Figures]:
    for path in sorted(folder.glob(f"{name}-cpu*.json")):
        yield json.loads(path.read_text())


def ratios(folder: Path) -> Iterator[Ratio]:
    """Of every kept run; how often theirs takes as long as ours."""
    for run in _runs(folder, "end_to_end"):
        for case in run["cases"]:
            work, sides = case["workload"], case["sides"]
            if (work["model"], work["beams"]) != (BASE, 3):
                continue
            theirs, ours = sides["transformers"], sides["fastvlm"]
            if case["weights"] is None:
                seconds = (side["total_s"]["median"] for side in (theirs, ours))
                yield Ratio(WHOLE, _over(*seconds), run)
            milliseconds = (side["ms_per_step"] for side in (theirs, ours))
            yield Ratio(STORED[case["weights"]], _over(*milliseconds), run)
    for run in _runs(folder, "job"):
        for case in run["cases"]:
            if (work := _JOBS.get(case["case"])) is not None:
                ratio = case["ratio"]
                yield Ratio(work, ratio["fastvlm"], run)
                if "fastvlm, features kept" in ratio:
                    yield Ratio(KEPT, ratio["fastvlm, features kept"], run)
                if "fastvlm, bf16 autocast" in ratio:
                    theirs = ratio["sdpa, bf16 autocast"]
                    yield Ratio(AUTOCAST[work], ratio["fastvlm, bf16 autocast"] / theirs, run)
                if work != WHOLE:
                    continue
                for side, narrow in {"fastvlm, int8": QUICK, "fastvlm, bf16": ROUNDED}.items():
                    if side in ratio:
                        yield Ratio(narrow, ratio[side], run)
                if "fastvlm, model in bf16" in ratio:
                    theirs = ratio["sdpa, model in bf16"]
                    yield Ratio(HALF, ratio["fastvlm, model in bf16"] / theirs, run)
    for run in _runs(folder, "families"):
        for case in run["cases"]:
            for name, work in FAMILIES.items():
                if case["case"].startswith(name):
                    yield Ratio(work, case["ratio"]["transformers"], case)
    for run in _runs(folder, "decoding"):
        for case in run["cases"]:
            if "6 languages" in case["case"]:
                yield Ratio(LANGUAGES, case["ratio"], run)
    for run in _runs(folder, "training"):
        for case in run["cases"]:
            theirs, ours = case["sides"]["transformers"], case["sides"]["fastvlm"]
            yield Ratio(FLORENZ, _over(theirs["seconds"], ours["seconds"]), run)
            more = case["sides"]["fastvlm, 6 targets"]["samples_per_second"]
            yield Ratio(TARGETS, more / theirs["samples_per_second"], run)


def _over(theirs: float, ours: float) -> float:
    return theirs / ours


def table(folder: Path = RESULTS, works: Sequence[str] = ROWS) -> str:
    """The block between the two marks of a page."""
    found = [each for each in ratios(folder) if each.work in works]
    rows = []
    for work in works:
        values = sorted(each.ratio for each in found if each.work == work)
        if values:
            rows.append((work, _range(values[0], values[-1])))
    days: dict[str, set[str]] = {}
    for each in found:
        days.setdefault(_machine(each.run), set()).add(each.run["date"][:10])
    machines = [f"{machine}: {', '.join(sorted(days[machine]))}" for machine in sorted(days)]
    headers = ("against transformers, in float32 unless said", "times as fast")
    return f"{markdown_table(headers, rows)}\n\nMeasured on {'; '.join(machines)}.\n"


def _range(least: float, most: float) -> str:
    low, high = (f"{value:.3g}" for value in (least, most))
    return low if low == high else f"{low} to {high}"


def _machine(run: Figures) -> str:
    cpu, versions = run["machine"]["cpu"], run["versions"]
    wide = next(
        (f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in cpu["features"]),
        "no AVX",
    )
    return (
        f"{cpu['model']} ({cpu['cores']} cores, {wide}, "
        f"torch {versions['torch'].split('+')[0]}, transformers {versions['transformers']})"
    )


def main() -> int:
    """Write the tables into README and docs/benchmarks.md."""
    for page, works in ((README, FIRST), (PAGE, ROWS)):
        before, _, rest = page.read_text().partition(BEGIN)
        _, mark, after = rest.partition(END)
        if not mark:
            print(f"{page}: no place for the figures", file=sys.stderr)
            return 2
        page.write_text(f"{before}{BEGIN}{table(works=works)}{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
