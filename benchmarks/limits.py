"""Where a floor is not reached: what the time is made of. ``python -m benchmarks.limits``

Two questions, measured in one run. A product of a few rows reads its weight and computes with it:
how long does each take alone, the reading (a sum over the same tensor) and the computing (the same
product in slices of the weight that lie in cache), and how much of the shorter hides behind the
longer? A small op is called from Python: what do the kernel, the dispatcher and the checks cost?
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Rotation, timed
from fastvlm import env, extension, ops
from fastvlm.tables import markdown_table

RESULTS = Path(__file__).resolve().parent / "results"
ROWS = (1, 4, 8, 16, 32)
SHAPE = (9216, 2304)  # a projection of Gemma-2-2B's MLP
COPIES = 4
IN_CACHE = 512 * 1024  # bytes of a slice, within a second-level cache
ROUNDS = 15
CALLS = 2000


def _medians(sides: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 2):
        for name, run in sides.items():
            seconds = timed(run)
            if number >= 2:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def product(rows: int, dtype: torch.dtype, weights: Sequence[Tensor]) -> dict[str, Any]:
    """Medians in microseconds of the product, of reading its weight, and of computing it."""
    outputs, inputs = SHAPE
    x = torch.randn(rows, inputs).to(dtype)
    slice_rows = IN_CACHE // (inputs * dtype.itemsize) // 12 * 12
    piece = weights[0][:slice_rows].clone()
    times = outputs // slice_rows

    def in_slices(weight: Tensor) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                torch.ops.fastvlm_cpu.linear(x, weight, None)

        return run

    whole = _medians({
        "product": Rotation(lambda w: ops.linear(x, w), [(w,) for w in weights]),
        "read": Rotation(lambda w: w.view(torch.float32).sum(), [(w,) for w in weights], 2),
    })  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # less what as many calls cost that compute nothing
        sliced = _medians({"slices": in_slices(piece), "calls": in_slices(piece[:0])})
    finally:
        torch.set_num_threads(threads)
    computing = (sliced["slices"] - sliced["calls"]) * outputs / (times * slice_rows)
    found = {**whole, "compute": computing / threads}
    return {
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{name}_us": round(1e6 * value, 1) for name, value in found.items()},
    }


def calls() -> list[dict[str, Any]]:
    """Microseconds of a call of a small op, 3 rows of 768 as in a decoding step."""
    x, residual, weight, bias = (torch.randn(*s, 768) for s in ((3,), (3,), (), ()))
    raw, op = torch.ops.fastvlm_cpu, torch.ops.fastvlm
    sides: dict[str, dict[str, Callable[[], Any]]] = {
        "rms_norm": {
            "kernel": lambda: raw.rms_norm(x, weight, 1e-6, 1.0),
            "op": lambda: op.rms_norm(x, weight, 1e-6, 1.0),
            "function": lambda: ops.rms_norm(x, weight),
            "eager": lambda: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight),
        },
        "residual_layer_norm": {
            "kernel": lambda: raw.residual_layer_norm(x, residual, weight, bias, None, 1e-5, 0.0),
            "op": lambda: op.residual_layer_norm(x, residual, weight, bias, None, 1e-5, 0.0),
            "function": lambda: ops.residual_layer_norm(x, residual, weight, bias),
            "eager": lambda: F.layer_norm(residual + x, (768,), weight, bias),
        },
    }

    def repeated(run: Callable[[], Any]) -> Callable[[], None]:
        def many() -> None:
            for _ in range(CALLS):
                run()

        return many

    rows = []
    for name, runs in sides.items():
        medians = _medians({side: repeated(run) for side, run in runs.items()}, 5)
        found = {f"{side}_us": round(1e6 * value / CALLS, 2) for side, value in medians.items()}
        rows.append({"op": name, **found})
    return rows


def tables(figures: dict[str, Any]) -> str:
    """Both as Markdown, for the report."""
    products = []
    for row in figures["products"]:
        read, compute, whole = row["read_us"], row["compute_us"], row["product_us"]
        hidden = (read + compute - whole) / min(read, compute)
        products.append((
            row["dtype"],
            str(row["rows"]),
            f"{whole:.0f}",
            f"{read:.0f}",
            f"{compute:.0f}",
            f"{100 * hidden:.0f} %",
        ))  # fmt: skip
    small = [
        (r["op"], *(f"{r[f'{side}_us']:.1f}" for side in ("kernel", "op", "function", "eager")))
        for r in figures["calls"]
    ]
    return "\n\n".join((
        f"A product with a weight of {SHAPE[0]} x {SHAPE[1]}, microseconds: the whole, reading the "
        "weight alone, computing alone (the weight in cache, each thread at its own share), and "
        "how much of the shorter of the two the longer hides. A negative share: there is something "
        "besides.",
        markdown_table(("dtype", "rows", "product", "read", "compute", "hidden"), products),
        "A call on 3 rows of 768, microseconds: the kernel as a torch op, the op of fastvlm (the "
        "choice of a backend in Python), its public function (checks), and eager PyTorch.",
        markdown_table(("op", "kernel", "op", "function", "eager"), small),
    ))  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    args = parser.parse_args(argv)
    if not extension.available():
        parser.error(f"no CPU extension: {extension.reason()}")
    found = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            weights = [torch.randn(SHAPE).to(dtype) for _ in range(COPIES)]
            found += [product(rows, dtype, weights) for rows in ROWS]
        small = calls()
    figures = {**env.stamp(), "device": "cpu", "products": found, "calls": small}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "limits-cpu.json"
    path.write_text(json.dumps(figures, indent=1) + "\n")
    print(tables(figures))
    print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
