"""The demo's chart: how long each phase takes on either side."""

from __future__ import annotations

from pathlib import Path

from benchmarks.demo.compare import PHASES, SIDES, Comparison

COLORS = {"transformers": "#8a94a3", "fastvlm": "#d9541e"}


def draw(comparison: Comparison, title: str, subtitle: str, place: str, stem: Path) -> list[Path]:
    """Write stem.svg and stem.png; returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    longest = max(comparison.seconds(side, "total") for side in SIDES)
    height = 0.36
    for row, side in enumerate(SIDES):
        seconds = [comparison.seconds(side, phase) for phase in PHASES]
        places = [index + (row - 0.5) * height for index in range(len(PHASES))]
        axes.barh(places, seconds, height * 0.94, color=COLORS[side], label=side)
        for where, phase, value in zip(places, PHASES, seconds):
            faster = f"   {comparison.ratio(phase):.2f}x" if side == "fastvlm" else ""
            axes.text(
                value + longest * 0.012,
                where,
                f"{value:.2f} s{faster}" if value >= 0.1 else f"{1000 * value:.0f} ms{faster}",
                va="center",
                fontsize=10,
                fontweight="bold" if side == "fastvlm" else "normal",
            )
    axes.set_yticks(
        range(len(PHASES)), ["vision", "prefill", "decoding", "whole call"], fontsize=11
    )
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.25)
    axes.set_xlabel(f"seconds, lower is better\n{place}", fontsize=9, color="#444444")
    figure.suptitle(f"{title}\n{subtitle}", fontsize=12, x=0.012, ha="left", linespacing=1.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="upper right", fontsize=10, bbox_to_anchor=(1, 0.98))
    paths = [stem.with_suffix(suffix) for suffix in (".svg", ".png")]
    for path in paths:
        # without a date the same figures give the same file
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)
    plt.close(figure)
    return paths
