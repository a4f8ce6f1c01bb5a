"""In a process of its own: a check of the CUDA kernels with a planted bug, under the sanitizers."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_checks
import cuda_emulator


def run_alone(ours: Callable[..., Any], plain: Callable[..., Any], inputs: list[Any]) -> None:
    """In place of the error rule: what is wrong is the sanitizers' to say."""
    ours(*inputs)


def main(check: str, floor: str, file: str, old: str, new: str) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        cuda_emulator.emulated("random", 1),
        cuda_emulator.replaced(floor, file, old, new, Path(folder)),
    ):
        getattr(cuda_checks, check)(run_alone)
    print("nothing found")


if __name__ == "__main__":
    main(*sys.argv[1:])
