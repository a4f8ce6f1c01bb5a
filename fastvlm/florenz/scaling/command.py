"""``fastvlm florenz grid``: many runs; ``fastvlm florenz scaling``: the laws fitted to them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from fastvlm.florenz.training.command import say, trainers
from fastvlm.florenz.training.settings import PROMPTS
from fastvlm.florenz.training.sizes import DECODERS, MULTILINGUALITY, SIZES
from fastvlm.tables import text_table
from fastvlm.usage import UsageError, whole_number


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``florenz scaling``."""
    parser.add_argument(
        "runs",
        metavar="RUNS",
        help="lines of JSON: size, parameters, trainable, samples, macs_per_sample, losses "
        '({"UC": ..., "ST": ..., "SC": ...}) and, where it is known, languages',
    )
    parser.add_argument("--out", metavar="FOLDER", help="fits as JSON, pictures as SVG and PNG")


def add_grid(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``florenz grid``."""
    parser.add_argument("--out", metavar="FOLDER", required=True, help="new, or with --resume")
    parser.add_argument(
        "--sizes", type=_sizes, metavar="NAME,...", default="nano,micro,tiny,small",
        help="default nano,micro,tiny,small",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=_numbers("--steps"), metavar="N,...", default="125,250,500,1000",
        help="of training, a run each; default 125,250,500,1000",
    )  # fmt: skip
    parser.add_argument(
        "--languages", type=_numbers("--languages", tuple(MULTILINGUALITY)), metavar="N,...",
        default="6,2", help="that the decoder has read before, of 2, 4, 6; default 6,2",
    )  # fmt: skip
    parser.add_argument(
        "--more", action="append", default=[], metavar="SIZE:LANGUAGES", type=_pair,
        help="one size with one more number of languages; any number of times",
    )  # fmt: skip
    parser.add_argument(
        "--decoder", choices=DECODERS, default="frozen",
        help="scratch: without --languages, for such a decoder has read nothing; default frozen",
    )  # fmt: skip
    parser.add_argument("--prompts", choices=PROMPTS, default="bare", help="default bare")
    parser.add_argument("--seed", type=whole_number("--seed", 0), default=0, help="default 0")
    parser.add_argument(
        "--scenes", type=whole_number("--scenes", 1), default=100, metavar="N",
        help="pictures that each run captions at its end; default 100",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=whole_number("--processes", 1, 256), default=1, metavar="N",
        help="runs at a time, each with its share of the cores; default 1",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="go on with what is open; more cells are welcome"
    )


def _sizes(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SIZES:
            raise UsageError("--sizes", f"names of {', '.join(SIZES)}", repr(name))
    return names


def _numbers(argument: str, of: tuple[int, ...] = ()) -> Callable[[str], list[int]]:
    """A type of argparse's arguments: whole numbers with commas between them."""
    number = whole_number(argument, 1)

    def parse(text: str) -> list[int]:
        found = [number(one) for one in text.split(",")]
        for one in found:
            if of and one not in of:
                raise UsageError(argument, f"numbers of {', '.join(map(str, of))}", one)
        return found

    return parse


def _pair(text: str) -> tuple[str, int]:
    size, _, languages = text.partition(":")
    (name,), (number,) = _sizes(size), _numbers("--more", tuple(MULTILINGUALITY))(languages)
    return name, number


def run_grid(args: argparse.Namespace) -> int:
    """0: every run is done. UsageError: a folder that cannot be used, a run that failed."""
    trainers("florenz grid")
    from fastvlm.florenz.scaling import grid
    from fastvlm.florenz.training.emergence import UNSEEN

    languages = [None] if args.decoder == "scratch" else args.languages
    cells = grid.cells_of(args.sizes, languages, args.steps)
    for size, number in args.more:
        cells += grid.cells_of([size], [number], args.steps)
    wanted = grid.Grid(tuple(dict.fromkeys(cells)), args.prompts, args.seed, args.scenes)
    out = Path(args.out)
    done = grid.run_grid(wanted, out, processes=args.processes, resume=args.resume, say=say)
    files = [out / grid.RUNS, out / grid.GRID]
    try:
        from fastvlm.florenz.scaling.plots import plot_emergence

        files += plot_emergence(done, args.scenes * len(UNSEEN), out)
    except ModuleNotFoundError:
        pass  # no picture without matplotlib and statsmodels
    print("\n".join(map(str, files)))
    return 0


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
