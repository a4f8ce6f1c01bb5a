"""The kernels in the emulator under AddressSanitizer and UndefinedBehaviorSanitizer.

They see what the emulator does not judge: local arrays, overflows, shifts. ThreadSanitizer is not
among them: the emulator answers its instrumentation itself. With its own runtime and fibers it
finds of tests/cuda/planted.cu the races that one barrier would order, which the emulator finds,
too; it misses copies that are not waited for and memory that nobody wrote, and calls it a race
where fences order two blocks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_emulator
import pytest

pytestmark = pytest.mark.cuda
HERE = Path(__file__).parent


def sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process with the sanitizers' libraries; its own leaks are not looked for."""
    libraries = [
        subprocess.run(
            [cuda_emulator.CXX, f"-print-file-name={name}"], capture_output=True, text=True,
            check=True,
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]  # fmt: skip
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        cuda_emulator.SANITIZED: "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
    }
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False,
        env=environment, cwd=HERE.parent,
    )  # fmt: skip


def test_the_kernels_pass() -> None:
    done = sanitized(
        "-m", "pytest", "-q", "-p", "no:xdist", "--cuda", "full", "--capture=sys",
        "tests/ops/test_cuda_mutants.py", "-k", "test_the_kernels_pass and random",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


# the check, what to compile, the file, what stands there, what is planted, what is said of it
PLANTED = {
    "local-array": ("int8", "mlp", "stream.cuh", "float value[4];", "float value[3];",
                    "out of bounds"),
    "overflow": ("far", "attention", "attention_keys.cuh",
                 "holder(key) * args.k_row + key * args.k_time",
                 "static_cast<int>(holder(key)) * static_cast<int>(args.k_row) + "
                 "key * args.k_time", "signed integer overflow"),
    "shift": ("int8", "mlp", "stream.cuh", "shifted >> 8 * i", "shifted >> 16 * i",
              "shift exponent"),
    "outside": ("few_rows", "mlp", "mlp.cuh", "row < args.rows && column < args.columns",
                "column < args.columns", "heap-buffer-overflow"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_bug_is_found(name: str) -> None:
    *arguments, words = PLANTED[name]
    done = sanitized(str(HERE / "cuda_sanitized.py"), *arguments)
    assert done.returncode != 0, done.stdout
    assert words in done.stderr
