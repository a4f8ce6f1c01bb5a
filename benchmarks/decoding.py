"""``python -m benchmarks.decoding``: where a decoding step's time goes, and a Florenz with a cache.

The step: Florence-2-base, float32, 3 beams, patched. Its kernels are timed by PyTorch's profiler,
which costs time itself, so the parts are shares of the step that was timed without it. Beside them
stands the floor: the bytes of the weights that a step reads over the bandwidth of this machine.

The languages: one photo captioned in six languages, 4 beams each, by one `fastvlm.caption` of a
patched model, against six calls of generate() by transformers; and what cross-attention's keys and
values take in both.

The cache: Florenz with a Gemma-2 decoder, reduced, 4 beams and 128 tokens, patched and with its
cache, against the same model without a cache, as published (arXiv 2503.09443, released code). Sides
take turns; the published one takes minutes, and no more than two rounds.

``--loop``: what the loop itself costs, and what leaving rows save (`benchmarks.loop_cases`), alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import fastvlm
from benchmarks import decoding_targets, loop_cases, measure, steps
from benchmarks.decoding_targets import AS_PUBLISHED, SEPARATE, TOGETHER
from benchmarks.steps import Captioning
from fastvlm import env
from fastvlm.captioning import models
from fastvlm.cpu.step import timed
from fastvlm.decoding.languages import LANGUAGES
from fastvlm.florenz import FlorenzConfig, FlorenzForConditionalGeneration
from fastvlm.loading.random_florence2 import load_photo
from fastvlm.tables import text_table

RESULTS = Path(__file__).resolve().parent / "results" / "decoding-cpu.json"
LOOP = RESULTS.with_name("loop-cpu.json")
OURS, LIBRARY = "fastvlm_cpu::", "aten::"
STEP = "fastvlm_cpu::step"


def profiled(decoder: Captioning, seconds: float) -> dict[str, float]:
    """Milliseconds of a step by what takes them; "Python" is what no operator accounts for.

    A step of the stack is one operator, which times its parts itself.
    """
    with profile(activities=[ProfilerActivity.CPU]) as seen, timed() as inside:
        total = decoder(steps.LONG)
    own = {f"step: {name}": value for name, value in inside.items() if value > 0}
    for event in seen.key_averages():
        if event.key.startswith((OURS, LIBRARY, "mkldnn::")):
            name = event.key if event.key.startswith(OURS) else "PyTorch's operators"
            own[name] = own.get(name, 0.0) + event.self_cpu_time_total / 1e6
    if STEP in own:
        own["step: between them"] = own.pop(STEP) - sum(inside.values())
    scale = 1e3 * seconds / total
    parts = {name: round(value * scale, 3) for name, value in own.items()}
    parts["Python, transformers' generate() included"] = round(
        1e3 * seconds - sum(parts.values()), 3
    )
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def step_case(rounds: int, tiny: bool) -> dict[str, Any]:
    """Bandwidth in each round too: on a virtual machine it changes with the neighbours."""
    decoder = steps.random_captioning(tiny)
    size = steps.step_weights(decoder.model)
    seconds: dict[str, list[float]] = {"transformers": [], "fastvlm": []}
    tokens, floors = {}, []
    for number in range(rounds + 1):
        for side, found in seconds.items():
            fastvlm.unpatch(decoder.model)
            if side == "fastvlm":
                fastvlm.patch(decoder.model)
            if number == 0:
                decoder(steps.SHORT)
                continue
            found.append(decoder.step())
            tokens[side] = decoder.tokens
        if number:
            floors.append(size / measure.stream_bandwidth("cpu"))
    medians = {side: statistics.median(found) for side, found in seconds.items()}
    floor = statistics.median(floors)
    shares = [least / taken for least, taken in zip(floors, seconds["fastvlm"])]
    return {
        "case": "a step of Florence-2-base, 3 beams",
        "ms": {side: round(1e3 * value, 3) for side, value in medians.items()},
        "rounds_ms": {side: [round(1e3 * s, 3) for s in found] for side, found in seconds.items()},
        "ratio": round(medians["transformers"] / medians["fastvlm"], 3),
        "identical_tokens": torch.equal(tokens["transformers"], tokens["fastvlm"]),
        "weight_bytes": size,
        "stream_gb_per_s": round(size / floor / 1e9, 2),
        "floor_ms": round(1e3 * floor, 3),
        "floor_share": round(statistics.median(shares), 4),
        "parts_ms": profiled(decoder, medians["fastvlm"]),
    }


def cross_bytes(cache: Any) -> int:
    """Bytes of cross-attention's keys and values."""
    total = 0
    for layer in cache.cross_attention_cache.layers:
        packed = getattr(layer, "packed", None)  # of a patched model; `keys` is a view for others
        for x in packed or (layer.keys, layer.values):
            total += x.numel() * x.element_size()
    return total


@contextmanager
def caches_noted(model: Any) -> Iterator[list[int]]:
    """Bytes of the cross cache of each generate() inside the block."""
    held: list[int] = []
    generate = model.generate

    def noted(*args: Any, **kwargs: Any) -> Any:
        output = generate(*args, **kwargs)
        held.append(cross_bytes(output.past_key_values))
        return output

    model.generate = noted
    try:
        yield held
    finally:
        del model.generate


def languages_case(rounds: int, tiny: bool) -> dict[str, Any]:
    """Whole calls, the vision tower included, which the six calls run six times."""
    photo, _ = load_photo(None)
    made = models.random(tiny, "cpu")
    tokens = 4 if tiny else 32
    wish = {"num_beams": 4, "max_new_tokens": tokens, "min_new_tokens": tokens}
    codes = list(LANGUAGES)

    def separate() -> list[Any]:
        return [
            found
            for code in codes
            for found in fastvlm.caption(made.model, made.processor, photo, [code], **wish)
        ]

    def together() -> list[Any]:
        return fastvlm.caption(made.model, made.processor, photo, codes, **wish)

    sides = {SEPARATE: separate, TOGETHER: together}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    found: dict[str, list[Any]] = {}
    held: dict[str, int] = {}
    for number in range(rounds + 1):
        for side, run in sides.items():
            fastvlm.unpatch(made.model)
            if side == TOGETHER:
                fastvlm.patch(made.model)
            if number == 0:  # a warm-up
                with caches_noted(made.model) as sizes:
                    run()
                held[side] = sum(sizes)
                continue
            start = time.perf_counter()
            found[side] = run()
            seconds[side].append(time.perf_counter() - start)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    theirs, ours = ([c.tokens for c in found[side]] for side in sides)
    same = all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(theirs, ours))
    return {
        "case": f"{made.name}, one photo, {len(codes)} languages, 4 beams, {tokens} tokens each, "
        "whole call",
        "seconds": {side: round(value, 3) for side, value in medians.items()},
        "ratio": round(medians[SEPARATE] / medians[TOGETHER], 2),
        "rounds_s": {side: [round(s, 3) for s in values] for side, values in seconds.items()},
        "cross_cache_bytes": held,
        "identical_tokens": same,
        "rounds": rounds,
    }


def florenz_case(rounds: int, tiny: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    tokens = 16 if tiny else 128
    settings = {"layers": 2, "width": 32, "vocab_size": 99} if tiny else {"layers": 4, "width": 256}
    config = FlorenzConfig.reduced("3.5B", **settings)
    model = FlorenzForConditionalGeneration(config).eval()
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.encoder_attn_gate.fill_(0.5)
        for name, p in model.model.decoder.layers.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 1.5 * p.shape[1] ** -0.5)
            elif "post_" in name:
                # the branches outweigh the embedding, which a tied head otherwise finds again: the
                # same few tokens over and over
                p.fill_(4.0)
    image = torch.full((1, 50), config.image_token_id)
    ids = torch.cat([image, torch.randint(4, 99, (1, 17))], 1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 224, 224)}
    wish = {
        "num_beams": 4, "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False,
    }  # fmt: skip
    sides: dict[str, dict[str, Any]] = {
        # the released code computes the logits of all positions at each step
        AS_PUBLISHED: {"use_cache": False, "logits_to_keep": 0},
        "without a cache": {"use_cache": False},
        "transformers' cache": {},
        "fastvlm": {},
    }
    found: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, how in sides.items():
            if side == AS_PUBLISHED and number > 2:
                continue
            fastvlm.unpatch(model)
            if side == "fastvlm":
                fastvlm.patch(model)
            if number == 0:  # a warm-up
                model.generate(
                    **inputs, **{**wish, "max_new_tokens": 4, "min_new_tokens": 4}, **how
                )
                continue
            start = time.perf_counter()
            found[side] = model.generate(**inputs, **wish, **how)
            seconds[side].append(time.perf_counter() - start)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "case": f"Florenz, Gemma-2 decoder, {config.decoder.num_hidden_layers} layers of "
        f"{config.decoder.hidden_size}, 4 beams, {tokens} tokens, whole call",
        "seconds": {side: round(value, 3) for side, value in medians.items()},
        "rounds_s": {side: [round(s, 3) for s in values] for side, values in seconds.items()},
        "ratio": {
            side: round(value / medians["fastvlm"], 2)
            for side, value in medians.items()
            if side != "fastvlm"
        },
        "identical_tokens": all(torch.equal(t, found["fastvlm"]) for t in found.values()),
        "distinct_tokens": len(set(found["fastvlm"].flatten().tolist())),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny models, for testing")
    parser.add_argument("--loop", action="store_true", help="the loop's own cases, alone")
    parser.add_argument("--out", type=Path, help="default: in the folder of results")
    args = parser.parse_args(argv)
    load = env.load_average()
    if args.loop:
        cases = loop_cases.cases(args.rounds, args.small)
        print("\n".join(map(loop_cases.told, cases)))
        return _kept(args.out or LOOP, cases, load)
    whole = 1 if args.small else 3
    step, florenz = step_case(args.rounds, args.small), florenz_case(whole, args.small)
    languages = languages_case(whole, args.small)
    print(f"{step['case']}: {step['ms']} ms, {step['ratio']}x")
    print(f"floor {step['floor_ms']} ms: {decoding_targets.of_the_floor(step['floor_share'])}\n")
    print(text_table(("part", "ms a step"), [(k, f"{v:.3f}") for k, v in step["parts_ms"].items()]))
    print(f"\n{florenz['case']}: {florenz['seconds']} s; {florenz['ratio']}; tokens the same: "
          f"{florenz['identical_tokens']}")  # fmt: skip
    print(f"{languages['case']}: {languages['seconds']} s; {languages['ratio']}x; tokens the same: "
          f"{languages['identical_tokens']}")  # fmt: skip
    theirs, ours = languages["cross_cache_bytes"].values()
    print(f"cross cache: {theirs} bytes in six calls, {ours} in one: 1/{theirs / ours:.1f}")
    return _kept(args.out or RESULTS, [step, languages, florenz], load)


def _kept(path: Path, cases: list[dict[str, Any]], load: Any) -> int:
    head = {**env.stamp(), "device": "cpu", "threads": torch.get_num_threads(),
            "load_average_before": load}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, "cases": cases}, indent=1) + "\n")
    print(f"written: {path}")
    return 0 if all(case["identical_tokens"] for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
