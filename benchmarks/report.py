"""Turns the results files into one page: Markdown tables and a chart of the ratios.

``python -m benchmarks.report [FOLDER]`` reads FOLDER/*.json and writes FOLDER/report.md and one
SVG for each micro-*.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastvlm.tables import markdown_table

RESULTS = Path(__file__).resolve().parent / "results"
Figures = dict[str, Any]


def _where(figures: Figures) -> str:
    machine, versions = figures["machine"], figures["versions"]
    cpu = machine["cpu"]
    name = machine["gpu"] if figures.get("device") == "cuda" else cpu["model"]
    threads = figures.get("threads", machine["threads"])
    return (
        f"{name}, {threads} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {figures['date'][:10]}"
    )


def _baseline(case: Figures) -> str:
    """The fastest of what a user would otherwise run."""
    medians: dict[str, float] = case["median_us"]
    return min((name for name in medians if name != "fastvlm"), key=lambda name: medians[name])


def micro(figures: Figures) -> str:
    rows = []
    for case in figures["cases"]:
        base = _baseline(case)
        medians, share = case["median_us"], case["floor_share"]
        rows.append((
            case["case"],
            case["dtype"],
            f"{case['floor_us']:.0f}",
            f"{medians[base]:.0f} ({base})",
            f"{medians['fastvlm']:.0f}",
            f"{case['ratio']:.2f}x",
            f"{100 * share[base]:.0f} %",
            f"{100 * share['fastvlm']:.0f} %",
        ))  # fmt: skip
    headers = (
        "case", "dtype", "floor, us", "baseline, us", "fastvlm, us", "faster",
        "baseline of floor", "fastvlm of floor",
    )  # fmt: skip
    intro = f"{_where(figures)}; memory read at {figures['stream_gb_per_s']} GB/s in the same run."
    return f"{intro}\n\n{markdown_table(headers, rows)}"


def end_to_end(figures: Figures) -> str:
    rows = []
    for case in figures["cases"]:
        theirs, ours = case["sides"]["transformers"], case["sides"]["fastvlm"]
        rows.append((
            case["workload"]["model"],
            str(case["workload"]["beams"]),
            "yes" if case["identical_tokens"] else "NO",
            f"{theirs['ms_per_step']:.1f}",
            f"{ours['ms_per_step']:.1f}",
            f"{case['ratio']['decoding']:.2f}x",
            f"{case['ratio']['total']:.2f}x",
            f"{theirs['peak_memory_mib']:.0f} / {ours['peak_memory_mib']:.0f}",
        ))  # fmt: skip
    headers = (
        "model", "beams", "identical tokens", "transformers, ms per step", "fastvlm, ms per step",
        "decoding faster", "whole call faster", "memory after vision, MiB",
    )  # fmt: skip
    return f"{_where(figures)}.\n\n{markdown_table(headers, rows)}"


def chart(figures: Figures, path: Path) -> None:
    """How many times faster than the best baseline, one bar a case; floats left of 1 are slower."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = figures["cases"]
    names = [f"{case['case']}  {case['dtype']}" for case in cases]
    ratios = [case["ratio"] for case in cases]
    size = (8, 1.2 + 0.22 * len(cases))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    colors = ["#d9541e" if ratio >= 1 else "#8a94a3" for ratio in ratios]
    axes.barh(range(len(cases)), ratios, 0.7, color=colors)
    for place, ratio in enumerate(ratios):
        axes.text(ratio, place, f" {ratio:.2f}x", va="center", fontsize=8)
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(cases)), names, fontsize=8)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xlim(0, max(ratios) * 1.12)
    axes.set_title("times faster than the fastest baseline", fontsize=11, loc="left")
    axes.set_xlabel(_where(figures), fontsize=8, color="#444444")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write(folder: Path) -> Path:
    """The page for all results in a folder; FileNotFoundError where there are none."""
    parts = ["# Benchmark results"]
    for path in sorted(folder.glob("*.json")):
        kind = path.stem.partition("-")[0]
        if kind not in ("micro", "end_to_end"):
            continue
        figures = json.loads(path.read_text())
        if kind == "micro":
            chart(figures, path.with_suffix(".svg"))
            parts += [
                f"## Kernels: {path.stem}",
                micro(figures),
                f"![{path.stem}]({path.stem}.svg)",
            ]
        else:
            parts += [f"## Whole models: {path.stem}", end_to_end(figures)]
    if len(parts) == 1:
        raise FileNotFoundError(f"no micro-*.json or end_to_end-*.json in {folder}: run make bench")
    page = folder / "report.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page


def main(argv: list[str]) -> int:
    try:
        print(f"written: {write(Path(argv[0]) if argv else RESULTS)}")
    except FileNotFoundError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
