"""Results of an evaluation: measured, as JSON, and as a table beside the paper's figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvlm.florenz.evaluation.metrics import METRICS, Means
from fastvlm.florenz.evaluation.paper import MEANS, paper_rows
from fastvlm.florenz.evaluation.records import Answer
from fastvlm.florenz.evaluation.tokens import Missing
from fastvlm.tables import text_table

RESULTS, ANSWERS = "evaluation.json", "answers.jsonl"
Figures = dict[str, dict[str, float]]


def measured(
    found: Sequence[Answer], metrics: Sequence[str], set_name: str, means: Means
) -> tuple[Figures, dict[str, dict[str, str]]]:
    """Figures by metric and language, the mean of the splits', and of those that could not be
    measured the reason."""
    by_language: dict[str, dict[str, list[Answer]]] = {}
    for one in found:
        by_language.setdefault(one.language, {}).setdefault(one.split, []).append(one)
    figures: Figures = {}
    missing: dict[str, dict[str, str]] = {}
    for name in metrics:
        metric = METRICS[name]
        for code, splits in by_language.items():
            try:
                values = [metric.measure(some, code, means) for some in splits.values()]
            except Missing as why:
                missing.setdefault(metric.name, {})[code] = str(why)
            else:
                figures.setdefault(metric.name, {})[code] = round(sum(values) / len(values), 3)
    add_means(figures, set_name)
    return figures, missing


def add_means(figures: Figures, set_name: str) -> None:
    """Means over the languages that the paper takes together, where all of them were measured."""
    for by_language in figures.values():
        for name, codes in MEANS.get(set_name, {}).items():
            if all(code in by_language for code in codes):
                by_language[name] = round(sum(by_language[c] for c in codes) / len(codes), 3)


def save(folder: Path, results: Mapping[str, Any]) -> Path:
    file = folder / RESULTS
    text = json.dumps(results, indent=1, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def table(results: Mapping[str, Any]) -> str:
    """The figures by language, those that the paper has beside its own, and what is missing."""
    figures: Figures = results["figures"]
    codes = list(dict.fromkeys(code for row in figures.values() for code in row))
    rows = [(name, *(_told(row.get(code)) for code in codes)) for name, row in figures.items()]
    texts = [text_table((f"{results['model']}, {results['set']}", *codes), rows)]
    if paper := paper_rows(results["set"]):
        columns = list(dict.fromkeys(key for row in paper.values() for key in row))
        own = {(name, code): v for name, row in figures.items() for code, v in row.items()}
        models = {str(results["model"]): own, **paper}
        lines = [(name, *(_told(row.get(key)) for key in columns)) for name, row in models.items()]
        texts.append(text_table(("", *(" ".join(key) for key in columns)), lines))
    notes = [
        f"not measured: {metric} {', '.join(codes)}: {why}"
        for metric, reasons in results["missing"].items()
        for why, codes in _by_reason(reasons).items()
    ]
    return "\n\n".join([*texts, *(["\n".join(notes)] if notes else [])])


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for code, why in reasons.items():
        found.setdefault(why, []).append(code)
    return found
