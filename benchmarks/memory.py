"""How much memory one call takes beside its operands and its results, on the CPU.

``python -m benchmarks.memory CASE SIDE`` runs one side of a case once, in a process of its own
whose peak nothing else has raised, and prints MiB.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.kinds import LossCase

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


def _status(field: str) -> int:
    """Bytes; VmRSS is what the process holds now, VmHWM the most that it has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def extra_memory(case: LossCase, side: str) -> float:
    """Growth of the peak during one call, less the gradients that the call must return.

    Where a peak comes before a gradient exists this says too little, which can only be to the
    advantage of a side whose temporary tensors are large.
    """
    from benchmarks.micro import test_loss

    # a small call first: code, thread pools and the libraries' own buffers are not the call's
    small = replace(case, rows=8, vocabulary=64, counted=4)
    test_loss.loss_functions(small)[side](*test_loss.loss_operands(small, torch.float32, "cpu"))
    operands = test_loss.loss_operands(case, torch.float32, "cpu")
    run = test_loss.loss_functions(case)[side]
    # 5 sets the peak back to what is held now (man 5 proc)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    results = run(*operands)
    returned = sum(result.numel() * result.itemsize for result in results)
    return (_status("VmHWM") - before - returned) / MIB


def of_sides(name: str, sides: Iterable[str]) -> dict[str, float]:
    """MiB of each side, each in a fresh process with this one's number of threads."""
    found = {}
    for side in sides:
        command = [sys.executable, "-m", "benchmarks.memory", name, side]
        threads = str(torch.get_num_threads())
        done = subprocess.run(
            [*command, threads], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        found[side] = float(done.stdout.split()[-1])
    return found


def main(argv: list[str]) -> int:
    name, side, *threads = argv
    if threads:
        torch.set_num_threads(int(threads[0]))
    case = cases.CASES[name]
    if not isinstance(case, LossCase):
        raise SystemExit(f"benchmarks.memory: {name} is no case of the loss")
    print(round(extra_memory(case, side), 1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
