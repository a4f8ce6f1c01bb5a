"""The command line: ``python -m fastvlm  env | build | demo | caption | bench | compile``."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fastvlm.demo import arguments, caption_arguments
from fastvlm.triton.compiling import command

SOURCE = Path(__file__).resolve().parent.parent


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastvlm",
        description="Fused kernels that make encoder-decoder vision-language models fast.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("env", help="versions, hardware, and which backend each op uses here")
    commands.add_parser("build", help="compile the extension (CPU kernels) now, not at first use")
    demo = commands.add_parser(
        "demo",
        help="caption a photo with and without fastvlm, and compare",
        description="Caption a photo with Florence-2-base through transformers and patched by "
        "fastvlm, in one process: tokens, times and memory of both. Exit code 1 if tokens differ.",
    )
    arguments.add(demo)
    caption = commands.add_parser(
        "caption",
        help="describe photos in several languages at once",
        description="Describe photos in several languages with a patched model: each photo is "
        "encoded once, and all languages and beams decode together. Each caption begins with the "
        "first words of its language, which is how captions emerge in languages that a model was "
        "only taught to translate into (arXiv 2503.09443).",
    )
    caption_arguments.add(caption)
    bench = commands.add_parser(
        "bench",
        help="run the kernel benchmarks (from a checkout)",
        description="Run the kernel benchmarks against PyTorch, interleaved, with their floors.",
    )
    bench.add_argument("case", nargs="*", help="only cases whose name contains one of these")
    compiling = commands.add_parser(
        "compile",
        help="compile every Triton kernel for several GPUs, without one, and count what came of it",
        description="Compile every Triton kernel in every configuration, as the launchers ask for "
        "it, for several GPUs and without one. Prints registers, spills, shared memory, occupancy, "
        "widths of loads and tensor core instructions. Exit code 1 if something does not compile, "
        "does not fit, spills, loads narrowly or leaves the tensor cores out.",
    )
    command.add(compiling)
    return parser


def _env() -> int:
    from fastvlm import env

    print(env.describe())
    return 0


def _build() -> int:
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
        print(library.build_in_place())
    except (library.CudaBuildError, OSError) as error:
        print(f"fastvlm build: {error}", file=sys.stderr)
        return 1
    return 0


def _bench(cases: Sequence[str]) -> int:
    if not (SOURCE / "benchmarks" / "cases.py").is_file():
        print(
            "fastvlm bench: the benchmarks are part of the source checkout, not of the installed "
            "package: clone the repository and run `python -m fastvlm bench` in it",
            file=sys.stderr,
        )
        return 2
    command = [sys.executable, "-m", "pytest", "benchmarks/micro", "--benchmark-enable", "-q"]
    # the garbage collector would run inside somebody's round
    command += ["--benchmark-disable-gc", "--benchmark-columns=median,iqr,rounds"]
    command += ["--benchmark-group-by=group", "--benchmark-sort=name"]
    if cases:
        command += ["-k", " or ".join(cases)]
    return subprocess.run(command, cwd=SOURCE, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = _parser().parse_args(argv)
        if args.command == "env":
            return _env()
        if args.command == "build":
            return _build()
        if args.command == "bench":
            return _bench(args.case)
        if args.command == "compile":
            if args.cuda:
                compiling = importlib.import_module("fastvlm.cuda.compiling")
                return int(compiling.run(args.only, args.out, args.check))
            return command.run(args)
        from fastvlm.demo import run

        return run(args)
    except arguments.UsageError as error:
        command_name = next(iter(sys.argv[1:] if argv is None else argv), "")
        print(f"fastvlm {command_name}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
