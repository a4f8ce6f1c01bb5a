"""Where a floor is not reached: what the time is made of. ``python -m benchmarks.limits``

Three questions, measured in one run. A product of a few rows reads its weight and computes with it:
how long does each take alone, the reading (a sum over the same tensor) and the computing (the same
product in slices of the weight that lie in cache), and how much of the shorter hides behind the
longer? What do huge pages (`fastvlm.cpu.pages`) save of that? A small op is called from Python:
what do the kernel, the dispatcher and the checks cost?
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Rotation, timed
from fastvlm import env, extension, ops
from fastvlm.cpu import pages
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


def paged() -> list[dict[str, Any]]:
    """Medians in microseconds over the weights of a step of Florence-2-base, float32: 3 rows of x
    times each, and reading them, in pages as they come and after `pages.gather`."""
    shapes = {
        "MLPs": [(3072, 768), (768, 3072)] * 6,
        "projections": [(768, 768)] * 36,
        "head": [(51289, 768)],
    }
    rows = []
    for name, each in shapes.items():
        small, huge = ([torch.randn(shape) for shape in each] for _ in range(2))
        size = sum(weight.nbytes for weight in small)
        start = time.perf_counter()
        moved = pages.gather(huge)
        seconds = time.perf_counter() - start
        x = {width: torch.randn(3, width) for width in (768, 3072)}

        def multiply(weights: list[Tensor], x: dict[int, Tensor] = x) -> None:
            for weight in weights:
                ops.linear(x[weight.shape[1]], weight)

        def read(weights: list[Tensor]) -> None:
            for weight in weights:
                weight.sum()

        medians = _medians({
            f"{what} {how}": functools.partial(run, weights)
            for what, run in (("product", multiply), ("read", read))
            for how, weights in (("small", small), ("huge", huge))
        })  # fmt: skip
        found = {f"{side.replace(' ', '_')}_us": round(1e6 * s, 1) for side, s in medians.items()}
        gathered = {"moved": moved, "moving_us": round(1e6 * seconds, 1)}
        rows.append({"weights": name, "bytes": size, **gathered, **found})
    return rows


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
    sides = ("product_small", "product_huge", "read_small", "read_huge")
    small = [
        (r["op"], *(f"{r[f'{side}_us']:.1f}" for side in ("kernel", "op", "function", "eager")))
        for r in figures["calls"]
    ]
    weights = [
        (
            r["weights"],
            f"{100 * r['moved'] / r['bytes']:.0f} %",
            f"{r['moving_us'] / 1e3:.0f}",
            *(f"{r[f'{side}_us']:.0f}" for side in sides),
        )
        for r in figures.get("pages", ())
    ]
    return "\n\n".join((
        f"A product with a weight of {SHAPE[0]} x {SHAPE[1]}, microseconds: the whole, reading the "
        "weight alone, computing alone (the weight in cache, each thread at its own share), and "
        "how much of the shorter of the two the longer hides. A negative share: there is something "
        "besides.",
        markdown_table(("dtype", "rows", "product", "read", "compute", "hidden"), products),
        "Products of 3 rows with the weights of a step of Florence-2-base, float32, and reading "
        "them, microseconds: in pages as they come and in huge ones (the share that the kernel "
        "moved, and the milliseconds of that).",
        markdown_table(("weights", "moved", "ms", *sides), weights),
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
        huge, small = paged(), calls()
    figures = {**env.stamp(), "device": "cpu", "products": found, "pages": huge, "calls": small}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "limits-cpu.json"
    path.write_text(json.dumps(figures, indent=1) + "\n")
    print(tables(figures))
    print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
