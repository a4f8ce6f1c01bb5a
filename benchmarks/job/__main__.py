"""``python -m benchmarks.job``: one photo, a batch of them and steps of fine-tuning, in one run.

Sides alternate in one process; medians, ratios to transformers with sdpa, tokens compared. Within
``--seconds`` each case has its share, and as many rounds as fit in it, but at least one.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.job import sides as sides_of
from benchmarks.job.sides import AUTOCAST, BF16, IN_BF16, KEPT, NARROW, OURS, side_of
from benchmarks.job.workload import TINY, Sizes, build, captioning, training
from fastvlm import VisionFeatures, env
from fastvlm.tables import text_table

RESULTS = Path(__file__).resolve().parents[1] / "results"
BASE = "sdpa"
ROUNDS = 5
Run = Callable[[], Any]
Timed = Callable[[], float]


def seconds_of(run: Run) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def rounds(runs: dict[str, Timed], share: float, most: int) -> dict[str, list[float]]:
    """Seconds of each side, in turns, until the share of time is spent."""
    found: dict[str, list[float]] = {side: [] for side in runs}
    begin = time.perf_counter()
    for number in range(most):
        start = time.perf_counter()
        for side, run in runs.items():
            found[side].append(run())
        now = time.perf_counter()
        print(f"  round {number + 1}: {now - start:.1f} s", file=sys.stderr, flush=True)
        if now - begin + (now - start) > share:
            break
    return found


def case_of(name: str, seconds: dict[str, list[float]], **facts: Any) -> dict[str, Any]:
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "case": name,
        **facts,
        "seconds": {side: [round(s, 4) for s in values] for side, values in seconds.items()},
        "median": {side: round(value, 4) for side, value in medians.items()},
        "ratio": {side: round(medians[BASE] / value, 4) for side, value in medians.items()},
    }


class Job:
    def __init__(self, tiny: bool, seconds: float, compiles: bool) -> None:
        self.sizes = TINY if tiny else Sizes()
        self.model = build(tiny)
        self.budget, self.compiles = seconds, compiles
        narrow = sides_of.narrow()
        self.missing = {side: why for side, why in narrow.items() if why is not None}
        self.narrow = tuple(side for side in narrow if side not in self.missing)
        # where a CPU has no products for it a model in bfloat16 takes minutes
        self.half = copy.deepcopy(self.model).bfloat16() if BF16 in self.narrow else None

    def cases(self) -> list[dict[str, Any]]:
        parts: list[tuple[float, Callable[[float], dict[str, Any]]]] = [
            (0.22, self.tower),
            (0.2, lambda share: self.captions("one photo", 1, share)),
            (0.2, lambda share: self.captions("photos", self.sizes.photos, share)),
            (0.13, lambda share: self.step("step, small images", True, share)),
            (0.25, lambda share: self.step("step", False, share)),
        ]
        found = []
        for weight, part in parts:
            found.append(part(weight * self.budget))
            print(_table(found[-1:]), flush=True)
        return found

    def side(self, side: str, run: Run) -> Timed:
        """Seconds of a run, without those of patching before it and taking back after it."""

        def within() -> float:
            with side_of(side, self.model_of(side)):
                return seconds_of(run)

        return within

    def model_of(self, side: str) -> Any:
        return self.half if side.endswith(IN_BF16) else self.model

    def in_bf16(self) -> tuple[str, ...]:
        return () if self.half is None else (f"{BASE}{IN_BF16}", f"{OURS}{IN_BF16}")

    def tower(self, share: float) -> dict[str, Any]:
        """The vision tower alone, one photo."""
        self.model.eval()
        pixels = captioning(self.model, self.sizes, 1)["pixel_values"]
        answers: dict[str, torch.Tensor] = {}

        def features(side: str) -> Timed:
            tower = self.model_of(side).model.vision_tower
            x = pixels.to(next(tower.parameters()).dtype)

            def run() -> None:
                with torch.inference_mode():
                    answers[side] = tower(x).last_hidden_state

            return self.side(side, run)

        def another(name: str, run: Callable[[torch.Tensor], torch.Tensor]) -> Timed:
            def keep() -> None:
                with torch.inference_mode():
                    answers[name] = run(pixels)

            return lambda: seconds_of(keep)

        runs = {side: features(side) for side in (BASE, OURS, *self.narrow, *self.in_bf16())}
        others: dict[str, Callable[[Any, torch.Tensor], Any]] = {
            "openvino": sides_of.openvino_tower
        }
        if self.half is not None:
            others["openvino, bf16"] = partial(sides_of.openvino_tower, precision="bf16")
        if self.compiles:
            others["compile"] = sides_of.compiled_tower
        for name, make in others.items():
            try:
                runs[name] = another(name, make(self.model, pixels))
            except Exception as error:  # a baseline that cannot be had is named, whatever it is
                self.missing[name] = f"{type(error).__name__}: {str(error)[:300]}"
        for warm_up in runs.values():
            warm_up()
        largest = answers[BASE].abs().max()
        off = {
            side: float((answer - answers[BASE]).abs().max() / largest)
            for side, answer in answers.items()
        }
        seconds = rounds(runs, share, ROUNDS)
        return case_of("tower", seconds, pixels=self.sizes.pixels, off_by=off)

    def captions(self, name: str, photos: int, share: float) -> dict[str, Any]:
        self.model.eval()
        inputs = captioning(self.model, self.sizes, photos)
        tokens: dict[str, torch.Tensor] = {}

        def generate(side: str, new: int) -> Timed:
            model = self.model_of(side)
            given = {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}

            def run() -> None:
                tokens[side] = model.generate(
                    **given, num_beams=3, do_sample=False, no_repeat_ngram_size=3,
                    early_stopping=True, max_new_tokens=new, min_new_tokens=new,
                )  # fmt: skip

            return self.side(side, run)

        chosen = (BASE, "eager", OURS) if photos == 1 else (BASE, OURS)
        chosen = (*chosen, *self.narrow, *self.in_bf16())
        if photos == 1:
            for side in chosen:
                generate(side, 2)()
        runs = {side: generate(side, self.sizes.tokens) for side in chosen}
        seconds = rounds(runs, share, ROUNDS)
        # in bfloat16 eager's tokens are not sdpa's either
        exact = [side for side in chosen if side not in NARROW and not side.endswith(IN_BF16)]
        same = {side: bool(torch.equal(tokens[side], tokens[BASE])) for side in exact}
        facts = {"photos": photos, "beams": 3, "new_tokens": self.sizes.tokens}
        return case_of(name, seconds, **facts, identical_tokens=same)

    def step(self, name: str, small: bool, share: float) -> dict[str, Any]:
        """Forward and backward, the tower frozen; the optimizer is the same for all."""
        s = self.sizes
        pixels, size = (s.short, s.short_batch) if small else (s.pixels, s.photos)
        batch = training(self.model, pixels, size, s)
        self.model.train()
        self.model.model.vision_tower.requires_grad_(False)
        losses: dict[str, float] = {}
        features: VisionFeatures | None = None

        def step(side: str) -> Timed:
            def run() -> None:
                given = dict(batch)
                if side == KEPT:
                    assert features is not None
                    given["pixel_values"] = features.of_keys(keys, lambda: batch["pixel_values"])
                self.model.zero_grad(set_to_none=True)
                with sides_of.forward_of(side):
                    loss = self.model(**given, use_cache=False).loss
                loss.backward()

            return self.side(side, run)

        def quiet_loss(side: str) -> None:
            self.model.eval()
            with torch.no_grad(), side_of(side, self.model), sides_of.forward_of(side):
                losses[side] = float(self.model(**batch, use_cache=False).loss)
            self.model.train()

        chosen = (BASE, "eager", OURS) if small else (BASE, OURS)
        if self.half is not None:
            chosen = (*chosen, f"{BASE}{AUTOCAST}", f"{OURS}{AUTOCAST}")
        runs = {side: step(side) for side in chosen}
        if small:  # without dropout, where the losses can be compared; a warm-up too
            for side in chosen:
                quiet_loss(side)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            if not small:
                # stochastic depth is left out of what is kept
                warnings.filterwarnings("ignore", message=".*draws at random")
                features = VisionFeatures(folder, self.model, dtype="float32")
                # a loader finds them by the picture, as it finds pixel_values ready
                keys = [features.key(one) for one in batch["pixel_values"]]
                runs[KEPT] = step(KEPT)
                runs[KEPT]()
                features.flush()
            seconds = rounds(runs, share, ROUNDS)
            if features is not None:
                features.detach()
        self.model.zero_grad(set_to_none=True)
        facts = {"pixels": pixels, "batch": size, "prompt_tokens": list(s.prompts)}
        return case_of(name, seconds, **facts, label_tokens=list(s.labels), eval_loss=losses)


def _table(cases: list[dict[str, Any]]) -> str:
    rows = [
        (case["case"], side, f"{seconds:.3f}", f"{case['ratio'][side]:.2f}x")
        for case in cases
        for side, seconds in case["median"].items()
    ]
    return text_table(("case", "side", "seconds", f"against {BASE}"), rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.job")
    parser.add_argument("--seconds", type=float, default=420.0, help="of all rounds, default 420")
    parser.add_argument("--compile", action="store_true", help="the tower by torch.compile too")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("--small", action="store_true", help="a tiny model, for testing")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    load = env.load_average()
    job = Job(args.small, args.seconds, args.compile)
    cases = job.cases()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"job-cpu{'-small' if args.small else ''}.json"
    head = {
        **env.stamp(),
        "threads": torch.get_num_threads(),
        "load_average_before": load,
        "missing": job.missing,
    }
    path.write_text(json.dumps({**head, "cases": cases}, indent=1) + "\n")
    print(f"\n{_table(cases)}\n\nwritten: {path}")
    for name, why in job.missing.items():
        print(f"left out: {name}: {why}")
    answers = [case["identical_tokens"] for case in cases if "identical_tokens" in case]
    return 0 if all(all(same.values()) for same in answers) else 1


if __name__ == "__main__":
    sys.exit(main())
