"""``python -m fastvlm compile``: record, compile, print, judge, compare."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm import triton as backend
from tools.compiling.architectures import ARCHITECTURES, DEFAULT

if TYPE_CHECKING:
    from tools.compiling.summary import Entries


class UsageError(ValueError):
    """Nothing can be compiled as it was asked for."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch", nargs="+", default=list(DEFAULT), metavar="ARCH",
        help=f"of {', '.join(ARCHITECTURES)} (default: {' '.join(DEFAULT)})",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME",
        help="only ops and kernels whose name contains one of these",
    )  # fmt: skip
    parser.add_argument(
        "--cuda", action="store_true", help="the CUDA kernels, by nvcc, instead of Triton's"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write all counts here, as JSON: megabytes"
    )
    parser.add_argument(
        "--renew", type=Path, metavar="FILE",
        help="compile only what this summary does not have of the kernels as they are now, add it, "
        "and leave out what nothing launches any more; counts of another Triton are refused. What "
        "is there already is not judged anew: after a change of a rule, begin with an empty file",
    )  # fmt: skip
    parser.add_argument(
        "--check", type=Path, metavar="FILE",
        help="compare with the counts of this file; any difference is exit code 1",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """0: everything compiles and is as it should be. 1: something is not. 2: nothing was done."""
    try:
        return _run(args)
    except UsageError as error:
        print(f"fastvlm compile: {error}", file=sys.stderr)
        return 2


def _triton() -> str:
    """The version of Triton, or why there is none."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UsageError("TRITON_INTERPRET is set: the interpreter compiles nothing")
    try:
        triton: Any = importlib.import_module("triton")
    except ImportError as error:
        raise UsageError(f"triton is not installed, or broken: {error}") from None
    version = str(triton.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < backend.OLDEST:
        raise UsageError(
            f"triton {version} is too old: {'.'.join(map(str, backend.OLDEST))} or newer"
        )
    return version


def _kept(option: str, path: Path, version: str) -> Entries:
    from tools.compiling import summary

    try:
        kept_version, entries = summary.load(path)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{option} {path}: {type(error).__name__}: {error}") from None
    if kept_version != version:
        raise UsageError(
            f"{option} {path}: its counts are of triton {kept_version}, this is {version}; nothing "
            "was done"
        )
    return entries


def _run(args: argparse.Namespace) -> int:
    unknown = [arch for arch in args.arch if arch not in ARCHITECTURES]
    if unknown:
        raise UsageError(f"unknown {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}")
    if args.renew is not None and (args.out is not None or args.check is not None):
        raise UsageError("--renew goes without --out and --check")
    version = _triton()
    from tools.compiling import jobs, report, summary, verdicts, work

    kept = None if args.check is None else _kept("--check", args.check, version)
    renewed = None if args.renew is None else _kept("--renew", args.renew, version)
    archs = list(dict.fromkeys(args.arch))
    recorded = jobs.record(archs, args.only)
    todo = sorted(recorded.jobs)
    if not todo and not recorded.faults:
        raise UsageError(f"no op or kernel has {' or '.join(map(repr, args.only))} in its name")
    print(f"triton {version}: {recorded.launches} launches, {len(todo)} compilations")
    had = summary.still_true(renewed or {}, recorded.jobs)
    todo = [job for job in todo if job not in had]
    if renewed is not None:
        print(f"{len(had)} of them are in {args.renew}, of the same code")
    results = work.compile_all(todo, log=_log)
    rows = [report.row(result, recorded.jobs[result.job]) for result in results]
    print(report.text(rows))
    found = verdicts.judge(results)
    wrong = sum(not verdict.exception for verdict in found)
    if recorded.faults:
        print("\nfaults of launchers:\n" + "\n".join(recorded.faults))
    if found:
        print("\n" + report.verdicts(found))
    if args.out is not None:
        report.save(args.out, version, rows)
    if renewed is not None:
        entries = summary.renewed(renewed, had.values(), rows, archs, args.only)
        summary.save(args.renew, version, entries)
    changes = [] if kept is None else summary.differences(kept, rows, archs, args.only)
    if changes:
        print("\nchanged:\n" + "\n".join(changes))
    print(
        f"\n{len(results)} compiled, {wrong + len(recorded.faults)} wrong"
        + (f", {len(changes)} changed" if kept is not None else "")
    )
    return 1 if wrong or recorded.faults or changes else 0


def _log(result: Any) -> None:
    """Seconds belong to the machine, not to the kernel: they are said here and kept nowhere."""
    job = result.job
    print(f"{result.seconds:6.2f} s  {job.kernel} {job.arch} {job.config}", file=sys.stderr)
