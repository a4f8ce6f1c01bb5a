"""``fastvlm florenz scaling``: fit the laws to a file of runs."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from fastvlm.tables import text_table
from fastvlm.usage import UsageError


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``florenz scaling``."""
    parser.add_argument(
        "runs",
        metavar="RUNS",
        help="lines of JSON: size, parameters, trainable, samples, macs_per_sample, losses "
        '({"UC": ..., "ST": ..., "SC": ...}) and, where it is known, languages',
    )
    parser.add_argument("--out", metavar="FOLDER", help="fits as JSON, pictures as SVG and PNG")


def run(args: argparse.Namespace) -> int:
    """0: fitted. UsageError: a file that does not read, too few runs, a package that is missing."""
    try:
        from fastvlm.florenz.scaling import laws, plots
        from fastvlm.florenz.scaling.runs import read_runs

        runs = read_runs(args.runs)
        groups = sorted(set.intersection(*(set(run.losses) for run in runs)))
        known = {run.languages for run in runs}
        fits = []
        for group in groups:
            compute = laws.fit_compute(runs, group)
            size = laws.fit_size_and_samples(
                runs, group, languages=None not in known and len(known) > 1
            )
            fits += [compute, size]
            if args.out is not None:
                Path(args.out).mkdir(parents=True, exist_ok=True)
                plots.plot_compute(runs, compute, Path(args.out))
                plots.plot_size(runs, size, Path(args.out))
    except ModuleNotFoundError as error:
        wanted = "what pip install 'fastvlm[florenz]' brings"
        raise UsageError("florenz scaling", wanted, f"no module {error.name}") from None
    except (ValueError, OSError) as error:
        raise UsageError("RUNS", "a file of runs that a law can be fitted to", error) from None
    rows = [
        (f.group, f.law, c.name, f"{c.value:.3f}", f"[{c.low:.3f}, {c.high:.3f}]", f"{c.p:.2g}",
         f"{f.r_squared:.3f}", str(f.points))
        for f in fits for c in f.coefficients
    ]  # fmt: skip
    print(text_table(("group", "law", "", "value", "95 %", "p", "R2", "runs"), rows))
    if args.out is not None:
        (Path(args.out) / "fits.json").write_text(json.dumps([asdict(f) for f in fits], indent=1))
    return 0
