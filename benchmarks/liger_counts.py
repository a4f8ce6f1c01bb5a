"""Liger-Kernel's kernels and ours for the same jobs, compiled and counted, without a GPU.

``python -m benchmarks.liger_counts [--arch sm_90]`` where liger-kernel is importable. Counted, not
timed: instructions of all threads for each element of the tensor that the job is about, of the
innermost loop where there is one, both sides of every branch included. Instructions are not time:
most of these jobs wait for memory, and what the counts show is what stands in the way of that.

Ours of GeGLU and cross entropy are in the epilogue of a product: of those all instructions outside
of the product's loop are counted, what comes before it too. A second table has whole jobs, with the
products of both sides, in launches and bytes (`benchmarks.traffic.jobs`).
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
from benchmarks.traffic import jobs, liger, no_device
from fastvlm import env
from fastvlm import triton as backend
from fastvlm.tables import markdown_table
from tools.compiling.architectures import ARCHITECTURES

M, N, F = 4096, GEMMA_2B.width, GEMMA_2B.hidden
HEADS = (GEMMA_2B.heads, GEMMA_2B.kv_heads, GEMMA_2B.head_dim)
V = 256_000
DTYPE = torch.bfloat16
HEADERS = (
    "job", "side", "kernel", "warps", "registers", "LDL + STL", "occupancy", "loads",
    "instructions / element", "launches",
)  # fmt: skip
JOB_HEADERS = (
    "job", "side", "launches, forward", "backward", "both", "MiB, forward", "backward", "both",
)  # fmt: skip
NOTES = """
Instructions of cross entropy: with the gradient, Liger's kernel has two loops over the logits, of
which the longer one is counted, and does the whole job; ours takes both its kernels.

Of jobs: Gemma-2-2B's width {width} and hidden {hidden}, vocabulary {vocabulary}, softcap 30. Bytes
are by the rules of `benchmarks/traffic/counter.py`: what a launch is given counts once, and twice
where it is rewritten, whatever a kernel reads again. So they leave out that Liger's cross entropy
goes over its logits twice, and have dh in each of our chunks, though only the last one writes it.

The ways to the loss trade memory for traffic. `linear, LigerCrossEntropyLoss` keeps all logits
({whole} MiB). `LigerFusedLinearCrossEntropyLoss` keeps those of 64 rows (its default,
chunk_mem_const=1: {few:.0f} MiB), and for each 64 rows reads the weight twice and rewrites its
gradient. fastvlm keeps no logits, {chunk:.0f} MiB of their gradients in the backward pass, and
computes the logits once more there: four products of rows by width by vocabulary, where Liger has
three, and the weight read once more. Where it has more bytes than twice the logits of all rows,
fastvlm moves more than a linear and its cross entropy do.
"""


@dataclass(frozen=True)
class Task:
    """elements: of one program, or of one round of its loop; ours_elements where ours takes another
    number. ours: the op, and its arguments. fused: the kernel whose epilogue does the job."""

    name: str
    elements: int
    liger: Callable[[], Any]
    ours: tuple[str, Callable[[], tuple[Any, ...]]]
    ours_elements: int = 0
    fused: str = ""


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
    mlp = (_x(M, N), _x(F, N), _x(F, N), _x(N, F))
    # of memory that is never touched
    head = (_x(M, N), _x(V, N), torch.empty(M, dtype=torch.int64))
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
        Task(
            "GeGLU", F, lambda: _of("geglu", "geglu_forward")(_x(M, F), _x(M, F)),
            ("geglu_mlp", lambda: (*mlp, True, True)), fused="geglu_forward",
        ),
        Task(
            "GeGLU backward", F,
            lambda: _of("geglu", "geglu_backward")(_x(M, F), _x(M, F), _x(M, F)),
            ("geglu_mlp_backward",
             lambda: (_x(M, N), mlp[0], _x(M, F), _x(M, F), *mlp[1:], True, [True] * 4)),
            fused="geglu_backward",
        ),
        Task(
            "cross entropy", chunk, lambda: _cross_entropy(False, None),
            ("linear_cross_entropy", lambda: (*head, None, 0.0, -100)), fused="cross_entropy_tiles",
        ),
        Task(
            "cross entropy, gradient", chunk, lambda: _cross_entropy(True, None),
            _loss_backward(head, 0.0), fused="cross_entropy_dlogits",
        ),
        Task(
            "cross entropy, softcap", chunk, lambda: _cross_entropy(False, 30.0),
            ("linear_cross_entropy", lambda: (*head, None, 30.0, -100)),
            fused="cross_entropy_tiles",
        ),
        Task(
            "cross entropy, softcap, gradient", chunk, lambda: _cross_entropy(True, 30.0),
            _loss_backward(head, 30.0), fused="cross_entropy_dlogits",
        ),
    ]  # fmt: skip


def _loss_backward(head: tuple[Tensor, ...], cap: float) -> tuple[str, Callable[[], Any]]:
    def arguments() -> tuple[Any, ...]:
        grad, lse = (torch.empty(M, *rest, dtype=torch.float32) for rest in ((), (2,)))
        return grad, *head, None, lse, cap, -100, 0.0, [True, True, False]

    return "linear_cross_entropy_backward", arguments


def _tile(job: Any) -> int:
    """Elements of a program's tile of a product."""
    sizes = dict(part.split("=") for part in job.config.split())
    return int(sizes["BLOCK_M"]) * int(sizes["BLOCK_N"])


def _lines(
    name: str, side: str, elements: int, launches: Sequence[Any], fused: str = ""
) -> list[list[str]]:
    from tools.compiling import work

    if fused:
        launches = [job for job in launches if job.kernel == fused]
    lines = []
    for result in work.compile_all(list(dict.fromkeys(launches))):
        job, counts = result.job, result.counts
        if counts is None:
            lines.append([name, side, job.kernel, result.failure.splitlines()[0], *[""] * 6])
            continue
        arch = ARCHITECTURES[job.arch]
        programs, limit = arch.occupancy(counts.registers, counts.shared, job.warps)
        instructions = counts.loop or counts.instructions
        if fused:
            instructions, elements = counts.instructions - counts.loop, _tile(job)
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
                f"{instructions * arch.warp * job.warps / elements:.1f}",
                str(launches.count(job)),
            ]
        )
    return lines


def kernel_rows(arch: str) -> list[list[str]]:
    """A line for each kernel of both sides."""
    from tools.compiling.driver import recording, run

    lines = []
    with backend.on_cpu_tensors(), fastvlm.use("triton"):
        for task in tasks():
            # Liger asks for the number of labels that count, and whether all are in range
            with recording(arch, value=1) as theirs:
                task.liger()
            lines += _lines(task.name, "Liger", task.elements, theirs)
            with recording(arch) as ours:
                run(task.ours[0], *task.ours[1]())
            side = "fastvlm, beside the product" if task.fused else "fastvlm"
            elements = task.ours_elements or task.elements
            lines += _lines(task.name, side, elements, ours, task.fused)
    return lines


def job_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line for each side of each job."""
    lines = []
    for r in records:
        parts = r["forward"], r["backward"]
        launches = [p["launches"] for p in parts]
        moved = [p["bytes"] / 2**20 for p in parts]
        numbers = [*map(str, (*launches, sum(launches)))]
        lines.append([r["job"], r["side"], *numbers, *(f"{x:.0f}" for x in (*moved, sum(moved)))])
    return lines


def notes() -> str:
    """What the table of jobs does not show."""
    from fastvlm.triton.loss import chunk_columns

    mib = 2 / 2**20
    return NOTES.format(
        width=N, hidden=F, vocabulary=V, whole=int(M * V * mib), few=64 * V * mib,
        chunk=M * chunk_columns(M, torch.empty(V, N, dtype=DTYPE, device="meta")) * mib,
    )  # fmt: skip


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
    versions = f"triton {env.versions()['triton']}, liger-kernel {liger.version()}"
    print(f"{args.arch}, bfloat16, rows {M}; {versions}\n")
    print(markdown_table(HEADERS, kernel_rows(args.arch)))
    if reason := no_device.missing():
        print(f"liger_counts: whole jobs cannot be counted: {reason}", file=sys.stderr)
        return 2
    print(f"\nWhole jobs, forward and backward, {no_device.ARCH}\n")
    print(markdown_table(JOB_HEADERS, job_rows(jobs.count(jobs.sizes()))))
    print(notes(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
