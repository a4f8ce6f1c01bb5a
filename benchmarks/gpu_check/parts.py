"""What is done on a GPU, in which order, and how long each part may take.

Two commands of less than five minutes each. Correctness: whether the kernels are right at all, in a
minute; then what a memory checker says of them; then as many of the ops' tests as the time allows,
a fair sample first; then whole models. Timings: ops, decoding, training.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.running import Part

COMMANDS = ("correctness", "timings")
SECONDS = 295.0
# tests share one GPU, but most of their time is Python's and the compiler's
WORKERS = min(12, os.cpu_count() or 1)
FIRST = "tests/ops/test_device.py"
MODELS = "tests/patching/test_models_on_gpu.py"
TOOL = "compute-sanitizer"


def of(command: str, folder: Path, rehearse: bool = False) -> list[Part]:
    """rehearse: without a GPU, everything up to the first kernel."""
    made = correctness if command == "correctness" else timings
    return made(folder, rehearse)


def _module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", name, *map(str, arguments)]


def pytest(folder: Path, rehearse: bool, *arguments: str, workers: int = 1) -> list[str]:
    """The settings of pyproject.toml name options of plugins that a machine may not have."""
    command = _module("pytest", "-o", "addopts=", "-ra", "--strict-markers", "-p",
                      "no:cacheprovider", "--continue-on-collection-errors",
                      f"--basetemp={folder / 'tmp'}", "-m", "gpu")  # fmt: skip
    if importlib.util.find_spec("pytest_benchmark") is not None:
        command += ["-p", "no:benchmark"]
    if rehearse:
        return [*command, *arguments, "--collect-only", "-q", "--as-on-gpu"]
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    return [*command, "-v", *arguments]


def correctness(folder: Path, rehearse: bool) -> list[Part]:
    tests = folder.parent / "pytest"

    def tested(name: str, *arguments: str, workers: int = WORKERS) -> list[str]:
        return pytest(tests / name, rehearse, *arguments, workers=workers)

    again = ["--rehearse"] if rehearse else []
    return [
        Part("environment", _module("benchmarks.gpu_check.machine"), 20),
        Part("build", _module("benchmarks.gpu_check.machine", "--build", *again), 50),
        Part("first", tested("first", FIRST), 60),
        *(_checked(tool, tests / tool, rehearse) for tool in ("memcheck", "racecheck")),
        Part("tests", tested("tests", "tests", f"--ignore={FIRST}", f"--ignore={MODELS}",
                             "--spread"), 45, elastic=True),
        Part("models", tested("models", MODELS), 40),
    ]  # fmt: skip


def _checked(tool: str, folder: Path, rehearse: bool) -> Part:
    """The tiny tests of the CUDA library under a tool of compute-sanitizer, our kernels alone."""
    found = shutil.which(TOOL) or shutil.which(TOOL, path="/usr/local/cuda/bin")
    missing = None if found else f"{TOOL} is not on the PATH, nor in /usr/local/cuda/bin"
    if rehearse:
        return Part(tool, [found or TOOL, "--version"], 40, missing=missing)
    options = ["--tool", tool, "--kernel-name", "kns=fastvlm", "--error-exitcode", "99",
               "--print-limit", "20"]  # fmt: skip
    command = pytest(folder, False, FIRST, "-k", "cuda-gpu and bf16")
    # a block of its own for each tensor: what lies behind it is nobody's
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part(tool, [found or TOOL, *options, *command], 40, environment=apart, missing=missing)


def timings(folder: Path, rehearse: bool) -> list[Part]:
    def timed(name: str, seconds: float, elastic: bool = False) -> Part:
        arguments: Sequence[object] = ["--out", folder / f"{name}.json"]
        arguments = [*arguments, *(["--rehearse"] if rehearse else ["--seconds", seconds - 10])]
        return Part(name, _module(f"benchmarks.gpu_check.{name}", *arguments), seconds, elastic)

    return [
        Part("environment", _module("benchmarks.gpu_check.machine"), 20),
        timed("ops", 110),
        timed("models", 95),
        timed("training", 60),
        Part("report", _module("benchmarks.gpu_check.report", folder), 10),
    ]
