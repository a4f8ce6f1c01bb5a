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

ATTENTION = [
    *_of(
        "attention", "attention_keys.cuh",
        ("order-ignored", "cross", "args.rows_by_image[first_reader + place]",
         "first_reader + place"),
        ("second-tile-of-rows-is-the-first", "more_rows",
         "block % a.row_blocks * kQueryRows;\n    first_reader", "0;\n    first_reader"),
        ("other-kv-head", "cross", "return kv_head * group + (first_row + m) % group",
         "return (first_row + m) % group"),
        ("readers-beyond", "cross", "if (place >= readers) return -1;", ""),
        ("a-key-too-many", "cross", "bool sees(int key) const { return key < hi; }",
         "bool sees(int key) const { return key <= hi; }"),
        ("values-of-the-first-image", "cross", "(first_key + key) * args.v_row",
         "key * args.v_row"),
        ("ancestry-off-by-one", "cached", "args.ancestry_row + key]",
         "args.ancestry_row + (key > 0 ? key - 1 : 0)]"),
        ("ancestry-of-the-first-row", "cached", "args.ancestry[reader * args.ancestry_row + key]",
         "args.ancestry[key]"),
        ("sees-padding", "cached", "key < hi && holder(key) >= 0", "key < hi"),
        ("window-off-by-one", "cached", "hi - static_cast<int>(a.window)",
         "hi - static_cast<int>(a.window) + 1"),
        ("heads-beyond-the-group", "cached",
         "first_row + m < args.heads / args.kv_heads ? reader : -1", "reader"),
        ("offset-of-32-bits", "far", "holder(key) * args.k_row + key * args.k_time",
         "static_cast<int>(holder(key) * args.k_row) + key * args.k_time"),
    ),
    *_of(
        "attention", "attention.cuh",
        ("no-barrier-after-the-wait", "cross", "gpu::copy_wait<1>();\n    gpu::barrier();",
         "gpu::copy_wait<1>();"),
        ("waits-for-one-too-few", "cross", "gpu::copy_wait<1>()", "gpu::copy_wait<2>()"),
        ("no-barrier-before-the-next-tile", "cross",
         "    // the next round brings a tile to where this one is\n    gpu::barrier();\n", ""),
        ("no-commit", "cross", "    gpu::copy_commit();\n", ""),
        ("one-stage", "cross", "tiles + (tile & 1) * 2 * Tile::kTileBytes;\n    if",
         "tiles;\n    if"),
        ("no-barrier-between-warps", "cross",
         "  gpu::barrier();\n  for (int i = gpu::thread_index(); i < kQueryRows",
         "  for (int i = gpu::thread_index(); i < kQueryRows"),
        ("tail-not-zeroed", "hidden",
         "gpu::copy_async16(v_tile + Tile::at(r, c), v, seen ? 16 : 0)",
         "if (seen) gpu::copy_async16(v_tile + Tile::at(r, c), v, 16)"),
        ("banks", "banks", "c ^ move", "c"),
        ("banks-of-96", "banks", "row / 2 & 3", "row & 3"),
        ("queries-in-another-order", "cross", "Tile::at(m, c), q + from",
         "m * Tile::kRowBytes + 16 * c, q + from"),
        ("swapped-matrices-of-q", "cross", "queries + Tile::at(lane % 16, 2 * step + lane / 16)",
         "queries + Tile::at(lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2)"),
        ("swapped-matrices-of-k", "cross",
         "lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2", "lane % 16, 2 * step + lane / 16"),
        ("swapped-words-of-k", "cross", "scores[0], q, k.word[0], k.word[1]",
         "scores[0], q, k.word[1], k.word[0]"),
        ("lost-transpose", "cross", "load_matrices_transposed", "load_matrices"),
        ("swapped-words-of-p", "cross",
         "gpu::pack<T>(p[0][0], p[0][1]), gpu::pack<T>(p[0][2], p[0][3])",
         "gpu::pack<T>(p[0][2], p[0][3]), gpu::pack<T>(p[0][0], p[0][1])"),
        ("swapped-halves-of-p", "cross", "gpu::pack<T>(p[1][0], p[1][1])",
         "gpu::pack<T>(p[1][1], p[1][0])"),
        ("values-of-another-column", "cross", "sums[2 * n + 1], a, v.word[2]",
         "sums[2 * n + 1], a, v.word[0]"),
        ("no-mask", "cross", "if (!seen) s = -INFINITY;", ""),
        ("no-cap", "cross", "kCapped ? args.outer", "false ? args.outer"),
        ("no-rescale", "cross", "        sums[n][2 * h] *= before;\n", ""),
        ("sum-not-rescaled", "cross", "total[h] * before + sum", "total[h] + sum"),
        ("half-of-the-lanes", "cross", "most = fmaxf(most, gpu::shuffle_xor(most, 2));", ""),
        ("sum-of-half-of-the-lanes", "cross", "total += gpu::shuffle_xor(total, 2);", ""),
        ("shuffle-of-some", "cross", "most = fmaxf(most, gpu::shuffle_xor(most, 1));",
         "if (gpu::thread_index() % 2) most = fmaxf(most, gpu::shuffle_xor(most, 1));"),
        ("warps-not-weighed", "cross",
         "const float weight = gpu::exp2(all_stats[2 * row] - base)", "const float weight = 1.f"),
        ("split-without-rescale", "cross",
         "const float weight = gpu::exp2(args.parts_stats[2 * part] - base)",
         "const float weight = 1.f"),
        ("splits-in-one-place", "cross", "split * args.rows * args.heads + to", "to"),
        ("splits-overlap", "cross", "begin + share < count ? begin + share : count", "count"),
        ("split-left-out", "cross", "split < args.splits; ++split) {\n    const int64_t part",
         "split < args.splits - 1; ++split) {\n    const int64_t part"),
        ("stats-of-a-warp", "stats", "stats[2 * to + 1] = total;",
         "stats[2 * to + 1] = all_stats[2 * m + 1];"),
        ("nothing-divided-by-nothing", "more_rows", "total > 0.f ? 1.f / total : 0.f;\n      gpu",
         "1.f / total;\n      gpu"),
    ),
]  # fmt: skip

MUTANTS = [*NORM, *ATTENTION]
