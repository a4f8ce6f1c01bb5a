"""``python -m benchmarks.training.drift``: a hundred steps, patched and not, from the same seed.

float32 without dropout, ten batches in turn. Beside the two curves stand five more: transformers'
own with its parameters moved by one rounding at the start, each at random, which is the drift that
rounding alone makes (it grows exponentially once the loss falls steeply). The patched curve must
stay within twice the furthest of them, or within what one rounding of the loss is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import fastvlm
from benchmarks.training import workload
from fastvlm import env

RESULTS = Path(__file__).resolve().parent.parent / "results"
MOVED = 5
RUNS = ("transformers", "fastvlm", *(f"moved by one rounding, {n + 1}" for n in range(MOVED)))
SHAPES = ("drift-florence", "drift-gemma")
COLORS = dict(zip(RUNS, ("#8a94a3", "#d9541e", *["#3a6ea5"] * MOVED)))


def losses(shape: workload.Shape, run: str, steps: int) -> list[float]:
    model = shape.model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    if run in RUNS[2:]:
        generator = torch.Generator().manual_seed(RUNS.index(run))
        with torch.no_grad():
            for p in trained:
                eps = torch.finfo(p.dtype).eps
                p.mul_(1 + eps * torch.randint(-1, 2, p.shape, generator=generator))
    if run == RUNS[1]:
        fastvlm.patch(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    found = []
    for step in range(steps):
        batch = workload.batch(model.config, shape.images, 1, seed=step % 10)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


def apart(curves: dict[str, list[float]]) -> dict[str, float]:
    """The largest distance from transformers' curve, of fastvlm's and of the moved ones."""
    base = torch.tensor(curves[RUNS[0]], dtype=torch.float64)
    return {
        run: (torch.tensor(curves[run], dtype=torch.float64) - base).abs().max().item()
        for run in RUNS[1:]
    }


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (9, 2.9 * len(cases))
    figure, axes = plt.subplots(len(cases), 2, figsize=size, layout="constrained", squeeze=False)
    for row, case in zip(axes, cases):
        base = torch.tensor(case["loss"][RUNS[0]])
        for run in RUNS[:2]:
            wide = {"linewidth": 4, "alpha": 0.5} if run == RUNS[0] else {"linewidth": 1.2}
            row[0].plot(case["loss"][run], color=COLORS[run], label=run, **wide)
        for run in RUNS[1:]:
            away = (torch.tensor(case["loss"][run]) - base).abs().clamp_min(1e-8)
            label = run if run == RUNS[1] else "transformers, moved by one rounding"
            wide = {"linewidth": 1.6, "zorder": 3} if run == RUNS[1] else {"linewidth": 0.8}
            row[1].plot(away, color=COLORS[run], label=label if run in RUNS[:3] else None, **wide)
        row[0].set_title(f"{case['shape']}: loss", fontsize=10, loc="left")
        row[1].set_title("distance from transformers' loss", fontsize=10, loc="left")
        row[1].set_yscale("log")
        for ax in row:
            ax.set_xlabel("step", fontsize=8)
            ax.grid(color="#e4e4e4", linewidth=0.6)
            ax.legend(frameon=False, fontsize=8)
            ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.drift")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=sorted(workload.SHAPES))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    args = parser.parse_args(argv)
    cases, good = [], True
    for name in args.shape:
        shape = workload.SHAPES[name]
        curves = {}
        for run in RUNS:
            curves[run] = losses(shape, run, args.steps)
            print(f"{name}, {run}: {curves[run][0]:.4f} -> {curves[run][-1]:.4f}", flush=True)
        distance = apart(curves)
        rounding = 2 * torch.finfo(torch.float32).eps * max(curves[RUNS[0]])
        within = distance[RUNS[1]] <= 2 * max(distance[run] for run in RUNS[2:]) + rounding
        good &= within
        print(f"{name}: {distance}, {'within' if within else 'NOT within'} twice rounding's own")
        cases.append({"shape": name, "loss": curves, "apart": distance, "within": within})
    args.out.mkdir(parents=True, exist_ok=True)
    figures = {**env.stamp(), "steps": args.steps, "cases": cases}
    (args.out / "training-drift.json").write_text(json.dumps(figures) + "\n")
    for suffix in ("svg", "png"):
        draw(cases, args.out / f"training-drift.{suffix}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
