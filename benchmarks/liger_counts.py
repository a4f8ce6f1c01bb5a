"""Liger-Kernel's kernels and ours for the same jobs, compiled and counted, without a GPU.

``python -m benchmarks.liger_counts [--arch sm_90]`` where liger-kernel is importable. Counted, not
timed: instructions of all threads for each element of the tensor that the job is about, of the
innermost loop where there is one, both sides of every branch included. Instructions are not time:
most of these jobs wait for memory, and what the counts show is what stands in the way of that.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastvlm
from benchmarks.cases import GEMMA_2B
from fastvlm import triton as backend
from fastvlm.tables import markdown_table
from fastvlm.triton.compiling.architectures import ARCHITECTURES

M, N, F = 4096, GEMMA_2B.width, GEMMA_2B.hidden
HEADS = (GEMMA_2B.heads, GEMMA_2B.kv_heads, GEMMA_2B.head_dim)
V = 256_000
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Task:
    """elements: of one program, or of one round of its loop; ours_elements where ours takes another
    number. ours: the op, and its arguments."""

    name: str
    elements: int
    liger: Callable[[], Any]
    ours: tuple[str, Callable[[], tuple[Any, ...]]] | None
    ours_elements: int = 0


def _x(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE)


def _of(module: str, function: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), function)


def _norm_backward() -> Any:
    block, warps = _of("utils", "calculate_settings")(N)
    rstd = torch.empty(M, dtype=torch.float32)
    run = _of("rms_norm", "rms_norm_backward")
    return run(_x(M, N), _x(M, N), _x(N), rstd, 1.0, 1, block, warps, False, None)


def _rope(back: bool) -> Any:
    # Liger takes q and k as attention has them, [batch, heads, tokens, head_dim]
    h, kv, d = HEADS
    q, k = _x(1, M, h, d).transpose(1, 2), _x(1, M, kv, d).transpose(1, 2)
    return _of("rope", "rope_backward" if back else "rope_forward")(q, k, _x(1, M, d), _x(1, M, d))


def _cross_entropy(trains: bool, softcap: float | None) -> Any:
    logits = _x(M, V).requires_grad_(trains)
    labels = torch.empty(M, dtype=torch.int64)
    run = _of("cross_entropy", "cross_entropy_forward")
    return run(logits, labels, None, -100, 0.0, 0.0, "mean", softcap, False)


def tasks() -> list[Task]:
    rope = importlib.import_module("fastvlm.triton.rope")
    h, kv, d = HEADS
    turned = (h + kv) * d
    block = rope.lanes(torch.empty(0)) * rope._EACH * 2 * rope._TOGETHER  # both halves, all heads
    chunk = 65536 // 2  # of the vocabulary, Liger's largest block
    table = (_x(M, h, d), _x(M, kv, d), _x(M, d), _x(M, d))
    return [
        Task(
            "RMSNorm", N,
            lambda: _of("rms_norm", "rms_norm_forward")(_x(M, N), _x(N), 1e-6, 1.0, "gemma", None),
            ("rms_norm", lambda: (_x(M, N), _x(N), 1e-6, 1.0)),
        ),
        Task(
            "RMSNorm backward", N, _norm_backward,
            ("rms_norm_backward",
             lambda: (_x(M, N), _x(M, N), _x(N), 1e-6, 1.0, [True, True])),
        ),
        Task("RoPE", turned, lambda: _rope(False), ("rope", lambda: table), block),
        Task("RoPE backward", turned, lambda: _rope(True), ("rope_backward", lambda: table), block),
        # ours are in the epilogue of a product, and have no launch of their own to count
        Task("GeGLU", F, lambda: _of("geglu", "geglu_forward")(_x(M, F), _x(M, F)), None),
        Task(
            "GeGLU backward", F,
            lambda: _of("geglu", "geglu_backward")(_x(M, F), _x(M, F), _x(M, F)), None,
        ),
        Task("cross entropy", chunk, lambda: _cross_entropy(False, None), None),
        Task("cross entropy, gradient", chunk, lambda: _cross_entropy(True, None), None),
        Task("cross entropy, softcap, gradient", chunk, lambda: _cross_entropy(True, 30.0), None),
    ]  # fmt: skip


def _lines(name: str, side: str, elements: int, launches: Sequence[Any]) -> list[list[str]]:
    from fastvlm.triton.compiling import work

    lines = []
    for result in work.compile_all(launches):
        job, counts = result.job, result.counts
        if counts is None:
            lines.append([name, side, job.kernel, result.failure.splitlines()[0], *[""] * 6])
            continue
        arch = ARCHITECTURES[job.arch]
        programs, limit = arch.occupancy(counts.registers, counts.shared, job.warps)
        threads = arch.warp * job.warps
        spills = counts.spill_loads + counts.spill_stores
        lines.append(
            [
                name,
                side,
                job.kernel,
                str(job.warps),
                str(counts.registers),
                str(spills),
                f"{arch.full(programs, job.warps):.0%} ({limit})",
                " ".join(f"{bits}:{n}" for bits, n in counts.loads.items()),
                f"{(counts.loop or counts.instructions) * threads / elements:.1f}",
                str(len(launches)),
            ]
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.liger_counts")
    parser.add_argument("--arch", default="sm_90", choices=list(ARCHITECTURES))
    args = parser.parse_args(argv)
    for package in ("triton", "liger_kernel"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            print(f"liger_counts: {package} cannot be imported: {error}", file=sys.stderr)
            return 2
    from fastvlm.triton.compiling.driver import recording, run

    lines = []
    with backend.on_cpu_tensors(), fastvlm.use("triton"):
        for task in tasks():
            # Liger asks for the number of labels that count, and whether all are in range
            with recording(args.arch, value=1) as theirs:
                task.liger()
            lines += _lines(task.name, "Liger", task.elements, theirs)
            if task.ours is not None:
                with recording(args.arch) as ours:
                    run(task.ours[0], *task.ours[1]())
                lines += _lines(task.name, "fastvlm", task.ours_elements or task.elements, ours)
    headers = (
        "job", "side", "kernel", "warps", "registers", "LDL + STL", "occupancy", "loads",
        "instructions / element", "launches",
    )  # fmt: skip
    print(f"{args.arch}, bfloat16, rows {M}\n")
    print(markdown_table(headers, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
