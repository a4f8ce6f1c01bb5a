"""``python3 -m benchmarks.gpu_check OUT [correctness|timings] [--rehearse]``."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu_check import parts, place, running

SLOWER = 8


def main(argv: Sequence[str] | None = None, made: Sequence[running.Part] | None = None) -> int:
    """0: every part that this machine can do was done and is green. 1: one is not. 2: nothing was.

    made: these parts, for a test.
    """
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_check",
        description="Tests and timings on a CUDA device, on a machine as it is: nothing is "
        "installed, fetched, or written outside of OUT and the cache (FASTVLM_CACHE_DIR, else "
        "~/.cache/fastvlm, else OUT/cache). Each command takes less than five minutes and leaves "
        "OUT/gpu-check-COMMAND.tar.gz, at most 16 MiB, with all that was found.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder")
    parser.add_argument("command", nargs="?", choices=parts.COMMANDS, help="default: both, in turn")
    parser.add_argument(
        "--rehearse", action="store_true",
        help="without a GPU, everything up to the first kernel: imports, the collection of tests, "
        "the build of the CUDA library, the timings of tiny shapes on the CPU, the report",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if made is None and not args.rehearse and not torch.cuda.is_available():
        print(
            "gpu-check: PyTorch sees no CUDA device here, so nothing was checked (--rehearse does "
            "what needs none)",
            file=sys.stderr,
        )
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    environment = place.environment(out)
    work = Path(environment["FASTVLM_CACHE_DIR"]) / "gpu-check"
    failed = 0
    for command in [args.command] if args.command else parts.COMMANDS:
        folder = work / command
        shutil.rmtree(folder, ignore_errors=True)
        todo = parts.of(command, folder, args.rehearse) if made is None else made
        if args.rehearse:  # on a machine of two cores that others share
            todo = [dataclasses.replace(part, seconds=SLOWER * part.seconds) for part in todo]
        found = running.run(command, todo, out, folder, environment)
        failed += _said(command, found, out)
    return 1 if failed else 0


def _said(command: str, found: Sequence[dict[str, object]], out: Path) -> int:
    """How many parts failed; each is named, and so is what was left out."""
    left_out = [part for part in found if "left_out" in part]
    failed = [part for part in found if part.get("exit") != 0 and part not in left_out]
    for part in left_out:
        print(f"gpu-check: {command}: {part['part']} left out: {part['left_out']}")
    for part in failed:
        how = running.ended(part["exit"])  # type: ignore[arg-type]
        print(f"gpu-check: {command}: {part['part']} failed ({how})")
    done = len(found) - len(left_out) - len(failed)
    print(f"gpu-check: {command}: {done} of {len(found)} parts done: "
          f"{out / f'gpu-check-{command}.tar.gz'}")  # fmt: skip
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
