"""Turns the results files into one page: Markdown tables, targets, and a chart of the ratios.

``python -m benchmarks.report [FOLDER]`` reads FOLDER/*.json and writes FOLDER/report.md and one
SVG for each micro-*.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import decoding_engines, decoding_targets, limits, targets
from benchmarks.traffic import tables as traffic
from fastvlm.tables import markdown_table

RESULTS = Path(__file__).resolve().parent / "results"
Figures = dict[str, Any]


def _where(figures: Figures) -> str:
    machine, versions = figures["machine"], figures["versions"]
    cpu = machine["cpu"]
    name = machine["gpu"] if figures.get("device") == "cuda" else cpu["model"]
    threads = figures.get("threads", machine["threads"])
    return (
        f"{name}, {threads} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {figures['date'][:10]}"
    )


def _amount(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def micro(figures: Figures) -> str:
    rows = []
    for case in figures["cases"]:
        medians, share = case["median_us"], case["floor_share"]
        ours = medians["fastvlm"]
        others = "; ".join(
            f"{name} {_amount(value)} ({value / ours:.2f}x, {100 * share[name]:.0f} %)"
            for name, value in medians.items()
            if name != "fastvlm"
        )
        rows.append((
            case["case"],
            case["dtype"],
            _amount(case["bytes"] / 1e6),
            _amount(case["flops"] / 1e9),
            f"{_amount(case['floor_us'])} ({case['floor_is']})",
            _amount(ours),
            f"{100 * share['fastvlm']:.0f} %",
            others,
        ))  # fmt: skip
    headers = (
        "case", "dtype", "MB", "GFLOP", "floor, us", "fastvlm, us", "of floor",
        "baselines, us (fastvlm is faster, of floor)",
    )  # fmt: skip
    intro = (
        f"{_where(figures)}; memory read at up to {figures['stream_gb_per_s']} GB/s in the same "
        "run, measured around each case."
    )
    missing = [f"{name} ({reason})" for name, reason in figures["missing_baselines"].items()]
    if missing:
        intro += f" Baselines left out: {', '.join(missing)}."
    memory = [
        f"{case['case']}: memory beside operands and results, MiB: "
        + ", ".join(f"{side} {value:.0f}" for side, value in case["extra_memory_mib"].items())
        for case in figures["cases"]
        if "extra_memory_mib" in case
    ]
    return "\n\n".join([intro, markdown_table(headers, rows), *memory])


def target_table(figures: Figures) -> str:
    """The targets of the CPU kernels and the case that is furthest from each."""
    rows = []
    for outcome in targets.outcomes(figures["cases"]):
        target = outcome.target
        least = target.measure not in targets.AT_MOST
        faster = target.measure == targets.FASTER

        def shown(value: float, faster: bool = faster) -> str:
            return f"{value:.2f}x" if faster else f"{100 * value:.1f} %"

        measured = "not measured"
        if outcome.measured is not None:
            measured = f"{shown(outcome.measured)} ({outcome.case})"
        rows.append((
            target.work,
            target.dtype,
            " or ".join(target.against) or "-",
            f"at {'least' if least else 'most'} {shown(target.bound)}"
            + ("" if faster else f" {target.measure}"),
            measured,
            {True: "met", False: "NOT MET", None: "-"}[outcome.met],
        ))  # fmt: skip
    headers = ("work", "weights", "against", "target", "measured, worst case", "")
    return markdown_table(headers, rows)


def _change(case: Figures) -> str:
    change = case.get("log_prob_change")
    return "" if change is None else f"{change['mean']:.1e}, {change['max']:.1e}"


def end_to_end(figures: Figures) -> str:
    rows = []
    for case in figures["cases"]:
        theirs, ours = case["sides"]["transformers"], case["sides"]["fastvlm"]
        rows.append((
            case["workload"]["model"],
            str(case["workload"]["beams"]),
            case.get("weights") or "own",
            "yes" if case["identical_tokens"] else "NO",
            f"{theirs['ms_per_step']:.1f}",
            f"{ours['ms_per_step']:.1f}",
            f"{case['ratio']['decoding']:.2f}x",
            f"{case['ratio']['total']:.2f}x",
            f"{theirs['peak_memory_mib']:.0f} / {ours['peak_memory_mib']:.0f}",
            str(case.get("stream_gb_per_s", "")),
            _change(case),
        ))  # fmt: skip
    headers = (
        "model", "beams", "weights", "identical tokens", "transformers, ms per step",
        "fastvlm, ms per step",
        "decoding faster", "whole call faster", "memory after vision, MiB",
        "memory read, GB/s", "log-probability, mean and largest change",
    )  # fmt: skip
    return f"{_where(figures)}.\n\n{markdown_table(headers, rows)}"


# of a patched step, against transformers eager: samples a second, and the step's memory
TRAINING = {"fastvlm": (3.0, 0.4), "fastvlm, 6 targets": (5.0, 0.4)}


def training(figures: Figures) -> str:
    rows = []
    for case in figures["cases"]:
        base, memory = case["sides"]["transformers"], case["peak_mib"]
        for side, found in case["sides"].items():
            faster = found["samples_per_second"] / base["samples_per_second"]
            share = memory[side]["step"] / memory["transformers"]["step"]
            verdict = ""
            if side in TRAINING:
                least, most = TRAINING[side]
                verdict = "met" if faster >= least and share <= most else "NOT MET"
                verdict = f"{least:g}x, {100 * most:.0f} %: {verdict}"
            batch = found["batch"]
            rows.append((
                case["shape"], side, f"{batch['targets']} of {batch['images']}",
                f"{batch['decoder_filled']:.0%}, {batch['encoder_filled']:.0%}",
                f"{found['seconds']:.2f}", f"{found['samples_per_second']:.2f}", f"{faster:.2f}x",
                f"{memory[side]['step']:.0f} ({share:.0%})", verdict,
            ))  # fmt: skip
    headers = (
        "model", "side", "targets of images", "of the grids are tokens", "seconds a step",
        "samples/s", "faster", "MiB of a step", "target",
    )  # fmt: skip
    return f"{_where(figures)}.\n\n{markdown_table(headers, rows)}"


def decoding(figures: Figures) -> str:
    """A step and what it is made of, then whole calls."""
    step, *calls = figures["cases"]
    parts = [(name, f"{value:.2f}") for name, value in step["parts_ms"].items()]
    lines = [
        f"{_where(figures)}.",
        f"{step['case']}: transformers {step['ms']['transformers']:.1f} ms, fastvlm "
        f"{step['ms']['fastvlm']:.1f} ms ({step['ratio']:.2f}x). Its weights are "
        f"{step['weight_bytes'] / 1e6:.0f} MB, which at {step['stream_gb_per_s']} GB/s take "
        f"{step['floor_ms']:.1f} ms: {decoding_targets.of_the_floor(step['floor_share'])}.",
        markdown_table(("part of a step", "ms"), parts),
    ]
    rows = []
    for call in calls:
        seconds = "; ".join(f"{side} {value:.2f} s" for side, value in call["seconds"].items())
        ratio = call["ratio"]
        ratio = ratio if isinstance(ratio, dict) else {"": ratio}
        faster = "; ".join(f"{side} {value:.2f}x".strip() for side, value in ratio.items())
        rows.append((call["case"], seconds, faster, "yes" if call["identical_tokens"] else "NO"))
    headers = ("work", "seconds", "fastvlm is faster", "identical tokens")
    lines.append(markdown_table(headers, rows))
    for call in calls:
        if (held := call.get("cross_cache_bytes")) is not None:
            each = "; ".join(f"{side} {size / 2**20:.2f} MiB" for side, size in held.items())
            theirs, ours = held.values()
            lines.append(f"Cross-attention's keys and values: {each}: 1/{theirs / ours:.1f}.")
    return "\n\n".join(lines)


def engines(figures: Figures) -> str:
    versions = figures["versions"]
    missing = [f"{name} ({reason})" for name, reason in figures["missing_baselines"].items()]
    settings = "; ".join(f"{name}: {how}" for name, how in figures["settings"].items())
    intro = (
        f"{_where(figures)}, onnxruntime {versions['onnxruntime']}, openvino "
        f"{versions['openvino']}. {figures['case']}, medians of {figures['rounds']} rounds; its "
        f"weights are {figures['weight_bytes'] / 1e6:.0f} MB, which at "
        f"{figures['stream_gb_per_s']} GB/s take {figures['floor_ms']:.1f} ms."
    )
    if missing:
        intro += f" Baselines left out: {', '.join(missing)}."
    lines = [intro, f"The engines: {settings}.", markdown_table(*decoding_engines.table(figures))]
    return "\n\n".join(lines)


COLORS = {"float32": "#d9541e", "bfloat16": "#3a6ea5"}


def chart(figures: Figures, path: Path) -> None:
    """How many times faster than the fastest baseline: a line a case, a dot a dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    cases = figures["cases"]
    names = list(dict.fromkeys(case["case"] for case in cases))
    place = {name: number for number, name in enumerate(names)}
    ratios = [case["ratio"] for case in cases]
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.18 * len(names)), layout="constrained")
    for dtype, color in COLORS.items():
        of_dtype = [case for case in cases if case["dtype"] == dtype]
        places = [place[case["case"]] for case in of_dtype]
        axes.scatter([case["ratio"] for case in of_dtype], places, 26, color, label=dtype, zorder=3)
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set_xscale("log")
    least, most = min(*ratios, 0.9), max(*ratios, 2.0)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if least <= tick <= most]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_title("times faster than the fastest baseline", fontsize=11, loc="left")
    axes.set_xlabel(_where(figures), fontsize=8, color="#444444")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="both", length=0, which="both")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


SINGLE = {
    "training-cpu": ("Training steps", training),
    "decoding-cpu": ("Decoding", decoding),
    "traffic": ("Launches and bytes, counted", traffic.markdown),
    "decoding-engines-cpu": ("A decoding step beside ONNX Runtime and OpenVINO", engines),
}


def _of_decoding(folder: Path) -> dict[str, Figures]:
    names = (decoding_targets.END_TO_END, decoding_targets.DECODING, decoding_targets.ENGINES)
    paths = [path for name in names if (path := folder / f"{name}.json").is_file()]
    return {path.stem: json.loads(path.read_text()) for path in paths}


def write(folder: Path) -> Path:
    """The page for all results in a folder; FileNotFoundError where there are none."""
    parts = ["# Benchmark results"]
    for path in sorted(folder.glob("*.json")):
        kind = path.stem.partition("-")[0]
        if path.stem not in SINGLE and kind not in ("micro", "end_to_end", "limits"):
            continue
        figures = json.loads(path.read_text())
        if kind == "micro":
            chart(figures, path.with_suffix(".svg"))
            parts += [
                f"## Kernels: {path.stem}",
                *(
                    ["### Targets of the CPU kernels", target_table(figures), "### All cases"]
                    if figures["device"] == "cpu"
                    else []
                ),
                micro(figures),
                f"![{path.stem}]({path.stem}.svg)",
            ]
        elif path.stem in SINGLE:
            title, table = SINGLE[path.stem]
            parts += [f"## {title}", table(figures)]
        elif kind == "limits":
            parts += ["## Where the time goes", limits.tables(figures)]
        else:
            parts += [f"## Whole models: {path.stem}", end_to_end(figures)]
    if files := _of_decoding(folder):
        parts += ["## Targets of decoding", markdown_table(*decoding_targets.table(files))]
    if len(parts) == 1:
        raise FileNotFoundError(f"no micro-*.json or end_to_end-*.json in {folder}: run make bench")
    page = folder / "report.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page


def main(argv: list[str]) -> int:
    try:
        print(f"written: {write(Path(argv[0]) if argv else RESULTS)}")
    except FileNotFoundError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
