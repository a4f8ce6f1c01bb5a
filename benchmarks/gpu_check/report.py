"""``python -m benchmarks.gpu_check.report FOLDER``: what the timings found, as a page of tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastvlm.tables import markdown_table

Figures = dict[str, Any]


def _ops(figures: Figures) -> list[str]:
    rows, words = [], []
    for case in figures["cases"]:
        name = f"{case['case']}{', compiled' if case['compiled'] else ''}"
        if "error" in case:
            words.append(f"- {name}: {case['error']}")
            continue
        for side, call in case["call_us"].items():
            graph = case["graph_us"].get(side)
            share = "" if graph is None else f"{100 * case['floor_us'] / graph:.0f} %"
            rows.append((name, side, f"{call:.1f}", "" if graph is None else f"{graph:.1f}", share))
        words += [f"- {name}, {side}: {why}" for side, why in case["failed"].items()]
    words += [f"- {side}: {why}" for side, why in figures["missing"].items()]
    ceilings = (
        f"Copies {figures['copy_bytes_per_s'] / 1e9:.0f} GB/s (read and written), bfloat16 "
        f"products {figures['bf16_flop_per_s'] / 1e12:.1f} TFLOP/s."
    )
    headers = ("case", "side", "a call, us", "in a graph, us", "of the floor")
    return ["## Ops", ceilings, markdown_table(headers, rows), *_left_out(words)]


def _left_out(words: list[str]) -> list[str]:
    return ["Left out or failed:\n\n" + "\n".join(words)] if words else []


def _models(figures: Figures) -> list[str]:
    rows = [
        (case["case"], side, f"{found['total_s']:.3f}", f"{found['step_ms']:.2f}",
         f"{found['vision_s']:.4f}", f"{found['memory_after_vision_mib']:.0f}",
         str(found["tokens_as_transformers"]))
        for case in figures["cases"]
        for side, found in case.get("sides", {}).items()
        if "total_s" in found
    ]  # fmt: skip
    headers = (
        "case",
        "side",
        "call, s",
        "step, ms",
        "vision, s",
        "MiB after vision",
        "same tokens",
    )
    return ["## Whole calls", markdown_table(headers, rows), *_left_out(_failed(figures))]


def _training(figures: Figures) -> list[str]:
    rows = [
        (case["case"], side, f"{found['seconds']:.4f}", f"{found['samples_per_second']:.1f}",
         str(found.get("peak_mib", "")))
        for case in figures["cases"]
        for side, found in case.get("sides", {}).items()
    ]  # fmt: skip
    headers = ("case", "side", "a step, s", "samples/s", "MiB of a step")
    return ["## Training", markdown_table(headers, rows), *_left_out(_failed(figures))]


def _failed(figures: Figures) -> list[str]:
    return [
        f"- {case['case']}, {side}: {why}"
        for case in figures["cases"]
        for side, why in case["failed"].items()
    ]


TABLES = {"ops": _ops, "models": _models, "training": _training}


def write(folder: Path) -> Path:
    """Of what is there: a part that was cut off has left what it had."""
    parts = ["# Measured on a GPU"]
    for name, table in TABLES.items():
        path = folder / f"{name}.json"
        if not path.exists():
            parts.append(f"{name}: not measured.")
            continue
        figures = json.loads(path.read_text())
        if len(parts) == 1:
            versions = ", ".join(f"{k} {v}" for k, v in figures["versions"].items())
            parts.append(f"{figures['machine']['gpu']}; {versions}; {figures['date']}.")
        parts += table(figures)
    page = folder / "report.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page


def main(argv: list[str]) -> int:
    page = write(Path(argv[0]))
    print(page.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
