"""The bugs that tests/ops/test_cuda_mutants.py plants."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """old is the only place of its kind in a file under csrc/cuda; floor: what to compile."""

    floor: str
    file: str
    name: str
    check: str
    old: str
    new: str


def _of(floor: str, file: str, *mutants: tuple[str, str, str, str]) -> list[Mutant]:
    return [Mutant(floor, file, *mutant) for mutant in mutants]


NORM = [
    *_of(
        "norm", "norm_rows.cuh",
        ("tail-loaded", "rms", "first + i < cols ? row[first + i] : gpu::from_float<T>(0.f)",
         "row[first + i]"),
        ("tail-stored", "rms", "if (first + j < cols) row[first + j] = part[j];",
         "row[first + j] = part[j];"),
        ("alignment-ignored", "rms", "return aligned && column + V <= cols;",
         "return column + V <= cols;"),
        ("no-barrier-in-the-sum", "rms", "    gpu::barrier();\n", ""),
        ("one-place-for-all-sums", "rms", "turn ^= 1;", ""),
        ("first-warp-alone", "rms", "lane < warps ? place", "lane < 1 ? place"),
        ("warps-that-are-not", "rms", "lane < warps ? place", "lane < kWarps ? place"),
        ("chunks-overlap", "rms", "(int64_t{chunk} * gpu::block_size() + gpu::thread_index()) * V",
         "(int64_t{chunk} + gpu::thread_index()) * V"),
        ("gate-of-the-raw-number", "rms", "return {tanhf(raw)", "return {raw"),
        ("slope-of-the-gate", "rms", "secant * secant", "secant"),
        ("counter-off-by-one", "layer", "(counter + 1) * 0x9E", "counter * 0x9E"),
        ("threshold-kept", "layer", "z >= dropout.threshold", "z < dropout.threshold"),
        ("mask-of-another-row", "layer", "row * cols + column(i / V)", "column(i / V)"),
        ("wide-weight-in-steps-of-one", "float32_weight", "gpu::load16(data + first + i)",
         "gpu::load16(data + first)"),
        ("wide-weight-taken-for-short", "float32_weight",
         "sizeof(T) == sizeof(float) || vector.dtype != DType::kFloat", "true"),
    ),
    *_of(
        "norm", "norm.cuh",
        ("next-norm-of-the-unrounded", "rms", "  row.load(args.next_weight, weight);\n", ""),
        ("mean-over-the-block", "layer", "row.inside(i) ? z[i] - mean : 0.f", "z[i] - mean"),
        ("bias-forgotten", "layer", "weight[i] + bias[i]", "weight[i]"),
    ),
    *_of(
        "norm", "norm_backward.cuh",
        ("no-projection", "rms", "scaled - x * rstd * rstd * (dot / cols)", "scaled"),
        ("last-row-lost", "rms", "last < args.rows ? last : args.rows",
         "last < args.rows ? last : args.rows - 1"),
        ("rows-beyond", "rms", "last < args.rows ? last : args.rows", "last"),
        ("parts-in-one-place", "rms",
         "row.store(args.dweight + gpu::block_x() * args.cols, dweight)",
         "row.store(args.dweight, dweight)"),
        ("grad-h-forgotten", "rms", "if (args.grad.data != nullptr) row.load(args.grad, r, dh);",
         ""),
        ("branch-not-gated", "rms", "x[i] = gate * through_rms", "x[i] = through_rms"),
        ("mean-of-the-gradient", "layer", "rstd * (sum[2] / args.cols)", "0.f"),
        ("dx-not-dropped", "layer", "    row.drop(args.dropout, r, z);\n", ""),
    ),
]  # fmt: skip

MUTANTS = [*NORM]
