"""What this machine is, and what it lacks; with --build, the CUDA library for its GPU."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastvlm import env
from fastvlm.cuda import library

# module: the package, and what is left out without it
OPTIONAL = {
    "pytest": "every test",
    "xdist": "tests in parallel",
    "hypothesis": "its tests of layouts and packing, which need no GPU",
    "ttsem": "the emulator of Triton kernels, which needs no GPU",
    "webdataset": "its loader's tests",
    "datasets": "its loader's tests",
    "torchdata": "its loader's tests",
    "liger_kernel": "Liger as a baseline",
    "cut_cross_entropy": "CCE as a baseline",
    "flash_attn": "flash-attn as a baseline",
    "transformers": "whole models",
    "skimage": "the photo; noise stands in for it",
    "ninja": "the package; a ninja of the system will do",
}
TOOLS = {
    "nvidia-smi": ["--query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem",
                   "--format=csv"],
    "nvcc": ["--version"],
    "g++": ["--version"],
    "ninja": ["--version"],
    "compute-sanitizer": ["--version"],
}  # fmt: skip


def missing() -> list[str]:
    return [
        f"{name} is not installed: without it, {what}"
        for name, what in OPTIONAL.items()
        if importlib.util.find_spec(name) is None
    ]


def _said(tool: str, options: list[str]) -> str:
    try:
        done = subprocess.run(
            [tool, *options], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout + done.stderr).strip()


def describe() -> str:
    packages = sorted(
        f"{found.metadata['Name']}=={found.version}" for found in importlib.metadata.distributions()
    )
    parts = [env.describe(), "missing here:\n" + "\n".join(missing() or ["nothing"])]
    parts += [f"{tool}:\n{_said(tool, options)}" for tool, options in TOOLS.items()]
    parts.append(f"load average: {env.load_average()}")
    return "\n\n".join([*parts, " ".join(packages)])


def build(rehearse: bool) -> int:
    """For the GPU that is here alone: of three architectures a third is enough."""
    start = time.monotonic()
    if rehearse or torch.cuda.is_available():
        os.environ.setdefault(library.VARIABLE, "9.0a" if rehearse else architecture())
    why = library.missing()
    if why is not None and rehearse and library.refused() == why:
        return _objects(why)
    if why is not None:
        print(f"the CUDA library is left out: {why}")
        return 1
    try:
        print(f"{library.build()}: {time.monotonic() - start:.1f} s")
    except library.BuildError as error:
        print(error)
        return 1
    if rehearse or library.reason() is None:
        print(f"loads: {library.reason() or 'yes'}")
        return 0
    print(f"does not load: {library.reason()}")
    return 1


def architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    # what tensor cores of one generation alone have is of a target of its own
    return f"{major}.{minor}{'a' if (major, minor) in ((9, 0), (10, 0)) else ''}"


def _objects(why: str) -> int:
    """Every source compiled against the headers of a PyTorch that has no CUDA to link with."""
    print(f"compiled, but not linked: {why}")
    with tempfile.TemporaryDirectory() as folder:
        for command in library.commands(Path(folder))[:-1]:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(done.stdout + done.stderr)
                return 1
            print(f"compiled: {Path(command[-1]).name}", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.machine")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    if args.build:
        return build(args.rehearse)
    print(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
