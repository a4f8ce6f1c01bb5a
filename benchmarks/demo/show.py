"""The demo itself: prepare, compare, print, draw, write down."""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

from benchmarks.demo import chart
from benchmarks.demo.arguments import out_folder
from benchmarks.demo.compare import SIDES, Comparison, compare
from benchmarks.demo.workload import Workload, pretrained_workload, random_workload
from fastvlm import env
from fastvlm.loading.random_florence2 import load_photo
from fastvlm.tables import text_table
from fastvlm.usage import UsageError


def _progress(line: str) -> None:
    print(f"demo: {line}", file=sys.stderr, flush=True)


def _warn_of_noise(load: float | None, result: Comparison) -> None:
    """A ratio of medians means little where the runs of one side are far apart."""
    spread = max(result.spread(side) for side in SIDES)
    if spread > 1.25:
        _progress(
            f"NOISY: runs of one side differ by a factor of {spread:.1f} (load before: {load}); "
            "repeat on an idle machine before quoting these times"
        )


def _prepare(args: argparse.Namespace) -> tuple[Workload, str]:
    photo, name = load_photo(args.image)
    start = time.perf_counter()
    if args.model is not None:
        if args.small:
            raise UsageError("--small", "no --model beside it", args.model)
        workload = pretrained_workload(
            photo,
            args.model,
            beams=args.beams,
            new_tokens=args.new_tokens,
            device=args.device,
        )
    else:
        workload = random_workload(
            photo,
            beams=args.beams,
            new_tokens=args.new_tokens,
            tiny=args.small,
            device=args.device,
        )
    took = time.perf_counter() - start
    _progress(f"{workload.facts['model']} ready: {took:.1f} s")
    return workload, name


def _model(workload: Workload) -> str:
    facts = workload.facts
    return (
        f"{facts['model']}, {facts['parameters'] / 1e6:.3g}M parameters, {facts['weights']} "
        f"weights, {facts['dtype']}"
    )


def _task(args: argparse.Namespace) -> str:
    beams = f"{args.beams} beam{'s' if args.beams > 1 else ''}"
    return f"up to {args.new_tokens} new tokens, {beams}"


def _describe(workload: Workload, photo: str, args: argparse.Namespace) -> str:
    facts = workload.facts
    lines = [
        _model(workload),
        f"photo {photo} at {facts['image_size']} px: {facts['image_tokens']} image tokens + "
        f"{facts['prompt_tokens']} of the prompt; {_task(args)}",
    ]
    if facts["weights"] != "real":
        lines.append(
            "The weights are random: the speed is real, the text would not be. "
            "With --model real weights write a caption."
        )
    return "\n".join(lines)


def _place(threads: int, device: str) -> str:
    machine = env.machine()
    if device == "cuda":
        return str(machine["gpu"])
    return f"{machine['cpu']['model']}, {threads} thread{'s' if threads > 1 else ''}"


def _text(workload: Workload, result: Comparison) -> str:
    """The captions of both sides with real weights, else the first token ids."""
    lines = []
    for side in SIDES:
        tokens = result.runs[side][0].tokens
        if workload.decode is not None:
            text = workload.decode(tokens)
        else:
            text = " ".join(str(token) for token in tokens[0, 1:13].tolist()) + " ..."
        lines.append(f"{'caption' if workload.decode else 'token ids'}, {side}: {text}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """The whole demo; returns 0, or 1 where the patched model's tokens differ."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device", "a device that is there", "cuda (PyTorch sees no GPU)")
    folder = out_folder(args.out)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()
    load = env.load_average()
    workload, photo = _prepare(args)
    print(_describe(workload, photo, args), flush=True)
    result = compare(workload, rounds=args.rounds, progress=_progress)

    place = _place(threads, args.device)
    print(f"\n{place}; medians of {args.rounds} interleaved runs\n")
    print(text_table(("", *SIDES, "ratio"), result.rows()))
    print(f"\nmemory: {result.memory_method}\n{_text(workload, result)}\n\n{result.patch_report}\n")

    _warn_of_noise(load, result)
    stem = folder / (f"demo-{args.device}" + ("-small" if args.small else ""))
    title = f"One photo captioned: {_task(args)}"
    written = chart.draw(result, title, _model(workload), place, stem)
    figures = {
        **env.stamp(),
        "workload": {
            **workload.facts,
            "image": photo,
            "beams": args.beams,
            "new_tokens": args.new_tokens,
            "rounds": args.rounds,
            "threads": threads,
        },
        "load_average_before": load,
        **result.figures(),
    }
    if workload.decode is not None:
        figures["caption"] = workload.decode(result.runs["fastvlm"][0].tokens)
    json_path = stem.with_suffix(".json")
    json_path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    print("written: " + ", ".join(str(path) for path in (json_path, *written)))
    if not result.identical:
        print(f"demo: the tokens differ: {result.difference}", file=sys.stderr)
        return 1
    return 0
