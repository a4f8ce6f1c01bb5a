"""The command line: ``python -m fastvlm COMMAND``, or ``fastvlm COMMAND``.

Exit codes: 0 done; 1 it was done, and what it found is not as it should be; 2 it could not be done
as asked, with one line that says why.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Command:
    """One command. add: declares its arguments.

    What add and run need is imported only when the command is asked for: ``env`` must work where
    torch is broken, and help must come at once.
    """

    help: str
    run: Callable[[argparse.Namespace], int]
    add: Callable[[argparse.ArgumentParser], None] | None = None
    description: str | None = None
    in_checkout: bool = False  # it is no part of the installed package


def _env(args: argparse.Namespace) -> int:
    from fastvlm import env

    print(env.describe())
    return 0


def _build(args: argparse.Namespace) -> int:
    try:
        extension = importlib.import_module("fastvlm.extension")
        path = extension.build()
    except Exception as error:
        print(f"fastvlm build: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if os.environ.get("FASTVLM_CPU") == "0":
        print(
            "fastvlm build: compiled, but FASTVLM_CPU=0 keeps it from being used", file=sys.stderr
        )
    elif not extension.available():
        print(f"fastvlm build: {path} does not load: {extension.reason()}", file=sys.stderr)
        return 1
    print(path)
    return _build_cuda()


def _build_cuda() -> int:
    """The CUDA kernels, where they can be built; where not, nothing is missing."""
    library = importlib.import_module("fastvlm.cuda.library")
    if library.missing():
        return 0
    try:
        print(library.build())
    except (library.BuildError, OSError) as error:
        print(f"fastvlm build: {error}", file=sys.stderr)
        return 1
    return 0


def _bench(args: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "pytest", "benchmarks/micro", "--benchmark-enable", "-q"]
    # the garbage collector would run inside somebody's round
    command += ["--benchmark-disable-gc", "--benchmark-columns=median,iqr,rounds"]
    command += ["--benchmark-group-by=group", "--benchmark-sort=name"]
    if args.case:
        command += ["-k", " or ".join(args.case)]
    return subprocess.run(command, cwd=SOURCE, check=False).returncode


def _compile(args: argparse.Namespace) -> int:
    if args.cuda:
        compiling = importlib.import_module("tools.compiling.cuda")
        return int(compiling.run(args.only, args.out, args.check))
    return int(importlib.import_module("tools.compiling.command").run(args))


def _check(args: argparse.Namespace) -> int:
    try:
        return int(importlib.import_module("fastvlm.checking.command").run(args))
    except ModuleNotFoundError as error:
        if error.name not in ("PIL", "transformers"):  # of the model that is checked
            raise
        raise _missing("caption", error) from None


def _demo(args: argparse.Namespace) -> int:
    return _with_extra("benchmarks.demo.show", "demo", args)


def _caption(args: argparse.Namespace) -> int:
    return _with_extra("fastvlm.captioning.command", "caption", args)


def _with_extra(module: str, extra: str, args: argparse.Namespace) -> int:
    """Run a command whose packages an extra of pip brings."""
    try:
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(extra, error) from None
    return int(command.run(args))


def _missing(extra: str, error: ModuleNotFoundError) -> Exception:
    from fastvlm.usage import UsageError

    wanted = f"what pip install 'fastvlm[{extra}]' brings"
    return UsageError("this command", wanted, f"no module {error.name}")


def _arguments_of(module: str) -> Callable[[argparse.ArgumentParser], None]:
    return lambda parser: importlib.import_module(module).add(parser)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("case", nargs="*", help="only cases whose name contains one of these")


# the steps of the reference workload, and the module of each; one with several has add_STEP
_FLORENZ = {
    "train": (
        "fastvlm.florenz.training.command",
        "train a small Florenz on the small world, from nothing to captions in six languages",
        "The recipe of arXiv 2503.09443 in small: captions in English and German, translations "
        "into five languages, then captions in four languages of which none was seen, with and "
        "without the first words of the language. Patched; no download. Several processes: "
        "torchrun --nproc-per-node N -m fastvlm florenz train ...",
    ),
    "finetune": (
        "fastvlm.florenz.training.finetune_command",
        "fine-tune a checkpoint on shards, a public set or the small world",
        "The recipe of arXiv 2503.09443: 256 images a step, 5000 steps, 5e-5 with a cosine, "
        "weight decay 0.05, frozen as in pre-training, all (task, language) pairs in balance. "
        "Patched. Several processes: torchrun --nproc-per-node N -m fastvlm florenz finetune ...",
    ),
    "emergence": (
        "fastvlm.florenz.training.command",
        "measure once more what a run of florenz train has learned",
        "Captions in six languages with and without the prefix, read back by the grammar, and "
        "losses of seen captioning, seen translation and unseen captioning.",
    ),
    "data": (
        "fastvlm.florenz.data.command",
        "make training data, or look through it",
        "Training data in the published form: WebDataset shards of images with texts, each with "
        "task, language and prompt. Of a small world that needs no download, or of images and "
        "texts of your own.",
    ),
    "evaluate": (
        "fastvlm.florenz.evaluation.command",
        "measure a checkpoint on Multi30K, CoMMuTE, Crossmodal-3600, COCO or the small world",
        "Captions in all languages of a set in one go, or translations, written by a patched model "
        "and measured as arXiv 2503.09443 does: BLEU, chrF, CIDEr, METEOR, COMET, CLIPScore, "
        "CoMMuTE's choice by perplexity. Results as JSON and as a table beside the paper's.",
    ),
    "grid": (
        "fastvlm.florenz.scaling.command",
        "train a grid of small runs, sizes x languages x steps, for the scaling laws",
        "Each run is a florenz train in a process of its own; those of a size share a vision "
        "tower, those of the same languages a language model. FOLDER/runs.jsonl is what florenz "
        "scaling reads, FOLDER/grid.json says as well what share of the captions is right.",
    ),
    "scaling": (
        "fastvlm.florenz.scaling.command",
        "fit the two scaling laws to runs of your own",
        "Loss over compute, and loss over parameters and samples (arXiv 2503.09443, equations 1 "
        "and 3), fitted in log space with 95 % confidence intervals and p-values.",
    ),
}


def _florenz(args: argparse.Namespace) -> int:
    module = importlib.import_module(_FLORENZ[args.step][0])
    return int(getattr(module, f"run_{args.step}", module.run)(args))


def _florenz_arguments(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    for name, (module, words, description) in _FLORENZ.items():
        found = importlib.import_module(module)
        add = getattr(found, f"add_{name}", found.add)
        add(steps.add_parser(name, help=words, description=description))


COMMANDS = {
    "env": Command("versions, hardware, and which backend each op uses here", _env),
    "build": Command("compile the extension (CPU kernels) now, not at first use", _build),
    "demo": Command(
        "caption a photo with and without fastvlm, and compare (from a checkout)",
        _demo,
        _arguments_of("benchmarks.demo.arguments"),
        "Caption a photo with Florence-2-base through transformers and patched by fastvlm, in one "
        "process: tokens, times and memory of both. Exit code 1 if tokens differ.",
        in_checkout=True,
    ),
    "caption": Command(
        "describe photos, folders and shards of them, in several languages at once",
        _caption,
        _arguments_of("fastvlm.captioning.arguments"),
        "Describe photos in several languages with a patched model: each photo is encoded once, "
        "and all languages and beams decode together. Each caption begins with the first words of "
        "its language, which is how captions emerge in languages that a model was only taught to "
        "translate into (arXiv 2503.09443). With --out a whole folder, or shards: every answer is "
        "a line of JSON, what cannot be read is a line that says why, and --resume takes it up "
        "wherever it ended; under torchrun several processes share the work.",
    ),
    "florenz": Command(
        "the reference workload, arXiv 2503.09443: its data, training and scaling laws",
        _florenz,
        _florenz_arguments,
    ),
    "check": Command(
        "run a model with and without fastvlm, and say whether anything differs",
        _check,
        _arguments_of("fastvlm.checking.arguments"),
        "Run a checkpoint without and with fastvlm on a photo and prompts: logits, loss, every "
        "gradient, the tokens of greedy and of beam search, times and memory. Exit code 0 where "
        "nothing differs, 1 where something does, 2 where it cannot be run.",
    ),
    "bench": Command(
        "run the kernel benchmarks (from a checkout)",
        _bench,
        _bench_arguments,
        "Run the kernel benchmarks against PyTorch, interleaved, with their floors.",
        in_checkout=True,
    ),
    "compile": Command(
        "compile every kernel for several GPUs, without one, and count (from a checkout)",
        _compile,
        _arguments_of("tools.compiling.command"),
        "Compile every Triton kernel in every configuration, as the launchers ask for it, for "
        "several GPUs and without one. Prints registers, spills, shared memory, occupancy, widths "
        "of loads and tensor core instructions. Exit code 1 if something does not compile, does "
        "not fit, spills, loads narrowly or leaves the tensor cores out.",
        in_checkout=True,
    ),
}


def _is_checkout() -> bool:
    """Whether the package lies in one; then its other folders can be imported, too."""
    if not (SOURCE / "benchmarks" / "cases.py").is_file():
        return False
    if str(SOURCE) not in sys.path:
        sys.path.insert(0, str(SOURCE))
    return True


def _parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser of all commands; only the wanted one knows its arguments."""
    parser = argparse.ArgumentParser(
        prog="fastvlm",
        description="Fused kernels that make encoder-decoder vision-language models fast.",
        epilog="Exit codes: 0 done; 1 done, and what it found is not as it should be; 2 it could "
        "not be done as asked, with one line that says why.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.help, description=command.description)
        if name == wanted and command.add is not None:
            command.add(one)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    from fastvlm.usage import UsageError

    given = sys.argv[1:] if argv is None else list(argv)
    wanted = next((word for word in given if not word.startswith("-")), None)
    if wanted in COMMANDS and COMMANDS[wanted].in_checkout and not _is_checkout():
        print(
            f"fastvlm {wanted}: this is part of the source checkout, not of the installed package: "
            f"clone the repository and run `python -m fastvlm {wanted}` in it",
            file=sys.stderr,
        )
        return 2
    try:
        args = _parser(wanted).parse_args(given)
        return COMMANDS[args.command].run(args)
    except UsageError as error:
        print(f"fastvlm {wanted}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
