"""Pictures of the two laws, loss over compute and over parameters, and of what emerges: each with
its intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from fastvlm.florenz.scaling.laws import Fit, pareto_frontier
from fastvlm.florenz.scaling.runs import Run
from fastvlm.florenz.training.results import WITH, WITHOUT

_STEPS = 60


def _axes(title: str, across: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.set(xscale="log", yscale="log", title=title, xlabel=across, ylabel="loss")
    axes.grid(True, which="both", alpha=0.2)
    return figure, axes


def _spread(low: float, high: float) -> list[float]:
    return [low * (high / low) ** (step / _STEPS) for step in range(_STEPS + 1)]


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    import matplotlib.pyplot as plt

    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def plot_compute(runs: Sequence[Run], fit: Fit, folder: Path) -> list[Path]:
    """Loss over compute: all runs, the frontier, the law and its interval; the files written."""
    figure, axes = _axes(f"{fit.group}: {fit.law}", "compute (10$^9$ multiply-adds)")
    figure.set_size_inches(8, 4)  # the legend stands beside it
    frontier = pareto_frontier(runs, fit.group)
    # the most languages in whole lines, fewer in broken ones
    known = sorted({run.languages or 0 for run in runs}, reverse=True)
    for number, size in enumerate(dict.fromkeys(run.size for run in runs)):
        for style, languages in zip(cycle(("-", "--", ":")), known):
            some = sorted(
                (r for r in runs if (r.size, r.languages or 0) == (size, languages)),
                key=lambda run: run.gmacs,
            )
            more = "" if len(known) == 1 else f", {languages} languages"
            axes.plot(
                [r.gmacs for r in some], [r.losses[fit.group] for r in some], f".{style}",
                alpha=0.5, color=f"C{number}", label=f"{size}{more}" if some else None,
            )  # fmt: skip
    points = [run.gmacs for run in frontier]
    axes.plot(points, [r.losses[fit.group] for r in frontier], "ko", mfc="none", label="frontier")
    at = _spread(min(points), max(points))
    _law(axes, at, [fit.predict(C=c) for c in at], str(fit.coefficients[1]))
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, folder, f"compute-{fit.group}")


def plot_size(runs: Sequence[Run], fit: Fit, folder: Path) -> list[Path]:
    """Loss over parameters, a line for each number of samples; the files written."""
    most = max((run.languages or 0 for run in runs), default=0)
    known = f", {most} languages read before" if "T^b3" in fit.law else ""
    figure, axes = _axes(f"{fit.group}: {fit.law}{known}", "parameters")
    shown = [run for run in runs if not known or run.languages == most]
    at = _spread(min(r.parameters for r in shown), max(r.parameters for r in shown))
    for number, samples in enumerate(sorted({run.samples for run in shown})):
        some = [run for run in shown if run.samples == samples]
        colour = f"C{number}"
        axes.plot(
            [r.parameters for r in some], [r.losses[fit.group] for r in some], "o", color=colour
        )
        others = {"T": float(most)} if known else {}
        law = [fit.predict(P=p, S=samples, **others) for p in at]
        _law(axes, at, law, f"{samples:,} samples", colour)
    sizes = {run.parameters: f"{run.size}\n{run.parameters / 1e6:.3g}M" for run in shown}
    axes.set_xticks(list(sizes), list(sizes.values()))
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=7)
    return _save(figure, folder, f"size-{fit.group}")


def plot_emergence(runs: Sequence[Mapping[str, Any]], captions: int, folder: Path) -> list[Path]:
    """Exact captions in languages never captioned, over samples, a line for each size and a panel
    for each number of languages that the decoder knew; the files written.

    runs: of `run_grid`. captions: of each run; they give the 95 % intervals (Wilson's).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({run["languages"] or 0 for run in runs})
    colours = {size: f"C{i}" for i, size in enumerate(dict.fromkeys(r["size"] for r in runs))}
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(1 + 3.5 * len(panels), 4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, languages in zip(all_axes[0], panels):
        some = [run for run in runs if (run["languages"] or 0) == languages]
        for size in dict.fromkeys(run["size"] for run in some):
            line = sorted((r for r in some if r["size"] == size), key=lambda run: run["samples"])
            samples = [run["samples"] for run in line]
            for way, style in ((WITH, "o-"), (WITHOUT, "x:")):
                shares = [run[way]["exact"] for run in line]
                axes.errorbar(
                    samples, [100 * share for share in shares], _wilson(shares, captions),
                    fmt=style, ms=4, lw=1, capsize=2, color=colours[size],
                    label=size if way == WITH else None,
                )  # fmt: skip
        known = f"{languages} languages read before" if languages else "decoder from scratch"
        axes.set(xscale="log", title=known, xlabel="samples")
        budgets = sorted({run["samples"] for run in some})
        axes.set_xticks(budgets, [f"{samples:,}" for samples in budgets])
        axes.minorticks_off()
        axes.grid(True, alpha=0.2)
    all_axes[0][0].set_ylabel("exact captions, never captioned languages, %")
    all_axes[0][0].legend(title="with the prefix (dotted: without)", fontsize=7, title_fontsize=7)
    return _save(figure, folder, "exact")


def _wilson(shares: Sequence[float], count: int) -> list[list[float]]:
    """How far the intervals of shares of a count reach down and up, in percent."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint([round(s * count) for s in shares], count, method="wilson")
    return [
        [max(0.0, 100 * (s - a)) for s, a in zip(shares, low)],
        [max(0.0, 100 * (b - s)) for s, b in zip(shares, high)],
    ]


def _law(
    axes: Any,
    at: Sequence[float],
    predicted: Sequence[tuple[float, float, float]],
    label: str,
    colour: str = "k",
) -> None:
    value, low, high = zip(*predicted)
    axes.plot(at, value, color=colour, lw=1, label=label)
    axes.fill_between(at, low, high, color=colour, alpha=0.12, lw=0)
