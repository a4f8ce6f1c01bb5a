"""A grid of runs, sizes x languages x steps, each a process of its own: the laws fit it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastvlm.florenz.scaling.flops import macs_per_sample
from fastvlm.florenz.scaling.runs import Run
from fastvlm.florenz.training.results import RESULTS, WITH, WITHOUT, unseen_mean
from fastvlm.florenz.training.settings import CHECKPOINTS, SETTINGS
from fastvlm.florenz.training.sizes import MULTILINGUALITY, SIZES, config_of
from fastvlm.usage import UsageError

RUNS, GRID = "runs.jsonl", "grid.json"
_SHARES = ("language", "exact")


@dataclass(frozen=True)
class Cell:
    """One run of a grid. languages: that its decoder has read before; None: it is trained from
    scratch."""

    size: str
    languages: int | None
    steps: int

    @property
    def name(self) -> str:
        return f"{self.size}-{self.languages or 'scratch'}-{self.steps}"


@dataclass(frozen=True)
class Grid:
    """The cells, and what all of them share: prompts and seed as `Settings` has them, scenes that
    are captioned at the end."""

    cells: tuple[Cell, ...]
    prompts: str
    seed: int
    scenes: int

    def start_of(self, cell: Cell) -> Cell | None:
        """The run that a run begins with, whose vision tower it takes and, where that has read as
        many languages, its language model: each is trained once. None: it trains them itself."""
        same = [one for one in self.cells if one.size == cell.size]
        alike = [one for one in same if one.languages == cell.languages]
        first = alike[0] if cell != alike[0] else same[0]
        return None if first == cell else first


def run_grid(
    grid: Grid, out: Path, *, processes: int, resume: bool, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Train what is not trained yet; returns what the cells reached, and keeps it in the folder.

    UsageError: a folder that holds something (without resume) or another grid (with it), or a run
    that failed: the others end, and its log is named.
    """
    _claim(grid, out, resume)
    open_cells = [cell for cell in grid.cells if not (out / cell.name / RESULTS).is_file()]
    say(f"{len(grid.cells)} runs, {len(grid.cells) - len(open_cells)} of them done")
    running: dict[Future[int], Cell] = {}
    failed: list[Cell] = []
    with ThreadPoolExecutor(processes) as pool:
        while open_cells or running:
            waiting = set(open_cells) | set(running.values())
            ready = [c for c in open_cells if grid.start_of(c) not in waiting and not failed]
            for cell in ready[: processes - len(running)]:
                open_cells.remove(cell)
                running[pool.submit(_train, grid, cell, out, processes)] = cell
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(done)
                if done.result():
                    failed.append(cell)
                    continue
                _write(grid, out)
                say(_line(cell, reached(grid, cell, out)))
    if failed:
        raise UsageError("--out", "runs that end well", f"one that failed: {_log(out, failed[0])}")
    return _write(grid, out)


def _claim(grid: Grid, out: Path, resume: bool) -> None:
    file, wanted = out / GRID, {**asdict(grid), "cells": [cell.name for cell in grid.cells]}
    if resume:
        try:
            before = json.loads(file.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError("--resume", f"a folder with a grid ({GRID})", out) from None
        # more cells are welcome; what all of them share may not change
        changed = [name for name in wanted if name != "cells" and before.get(name) != wanted[name]]
        if changed:
            raise UsageError("--resume", f"the settings of the grid in {out}", ", ".join(changed))
    elif out.exists() and any(out.iterdir()):
        raise UsageError("--out", "a folder that is new or empty, or --resume", out)
    out.mkdir(parents=True, exist_ok=True)
    _write(grid, out)


def _log(out: Path, cell: Cell) -> Path:
    return out / f"{cell.name}.log"


def _decoder(cell: Cell) -> str:
    return "scratch" if cell.languages is None else "frozen"


def _train(grid: Grid, cell: Cell, out: Path, processes: int) -> int:
    """A run in a process of its own, with its share of the cores; its exit code."""
    folder, start = out / cell.name, grid.start_of(cell)
    # of no meaning to a decoder trained from scratch
    languages = cell.languages or max(MULTILINGUALITY)
    command: list[Any] = [
        sys.executable, "-m", "fastvlm", "florenz", "train", "--out", folder, "--size", cell.size,
        "--decoder", _decoder(cell), "--languages", languages, "--steps", cell.steps,
        "--prompts", grid.prompts, "--seed", grid.seed, "--scenes", grid.scenes,
    ]  # fmt: skip
    if start is not None:
        command += ["--start-from", out / start.name]
    if (folder / SETTINGS).is_file():
        command.append("--resume")
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **os.environ}
    with _log(out, cell).open("a", encoding="utf-8") as log:
        ended = subprocess.run(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, env=environment, check=False,
        )  # fmt: skip
    if ended.returncode == 0:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return ended.returncode


def reached(grid: Grid, cell: Cell, out: Path) -> dict[str, Any]:
    """What a run of the grid reached: the fields of a `Run`, steps, and in "with the prefix" and
    "without it" the shares of captions in languages never captioned that are in the asked language,
    and exact."""
    results = json.loads((out / cell.name / RESULTS).read_text(encoding="utf-8"))
    size, parameters, found = SIZES[cell.size], results["parameters"], results["emergence"]
    run = Run(
        cell.size, parameters["total"], parameters["trainable"],
        cell.steps * size.images * size.targets, _macs(cell, grid.prompts), found["losses"],
        cell.languages,
    )  # fmt: skip
    shares = {way: {name: unseen_mean(found, way, name) for name in _SHARES}
              for way in (WITH, WITHOUT)}  # fmt: skip
    return {**asdict(run), "steps": cell.steps, "seconds": results["seconds"], **shares}


@cache
def _macs(cell: Cell, prompts: str) -> float:
    """Multiply-adds of a sample as long as the world's are on average."""
    from fastvlm.florenz.training.batches import world_words
    from fastvlm.florenz.training.emergence import held_out

    size, words = SIZES[cell.size], world_words(prompts)
    texts = [text for one in held_out(size, 50) for text in one.annotations]
    targets = words.targets(texts)
    mean = {key: sum(len(one[key]) for one in targets) / len(targets)
            for key in ("prompt_ids", "label_ids")}  # fmt: skip
    return macs_per_sample(
        config_of(size, _decoder(cell), len(words.prompts) - 1, len(words.texts)),
        image_size=size.pixels, prompt_tokens=round(mean["prompt_ids"]),
        target_tokens=round(mean["label_ids"]),
    )  # fmt: skip


def _write(grid: Grid, out: Path) -> list[dict[str, Any]]:
    """What is done so far, whole, and as lines that `florenz scaling` reads."""
    done = [
        reached(grid, cell, out) for cell in grid.cells if (out / cell.name / RESULTS).is_file()
    ]
    settings = {**asdict(grid), "cells": [cell.name for cell in grid.cells]}
    (out / GRID).write_text(json.dumps({"settings": settings, "runs": done}, indent=1) + "\n")
    names = Run.__dataclass_fields__
    lines = (json.dumps({name: run[name] for name in names}) for run in done)
    (out / RUNS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return done


def _line(cell: Cell, run: dict[str, Any]) -> str:
    losses = ", ".join(f"{name} {value:.3f}" for name, value in sorted(run["losses"].items()))
    return f"{cell.name}: {losses}; exact, never seen {run[WITH]['exact']:.1%}"


def cells_of(
    sizes: Sequence[str], languages: Sequence[int | None], steps: Sequence[int]
) -> list[Cell]:
    """Every size with every number of languages and of steps; the cheapest first, for the others
    begin with what it trains."""
    return [Cell(s, t, n) for s in sizes for t in languages for n in sorted(steps)]
