"""What a decoding loop costs beside its kernels, and what leaving rows save it.

The loop: a step of generate() with Florence-2's published settings, 3 beams and greedy, less what
its kernels take: those of the stack's program (timed inside of it), and the head's. Both are
differences of a long and a short caption, by their tokens. transformers' loop stands beside it, on
the same patched model, so that the kernels are the same.

The ends: captions of 8 photos, 3 beams, that end after 8 to 64 tokens, drawn from a seed: a
criterion says when, the same for all sides, which looks at each row alone and tells the photo by
the row's second token. Sides take turns: fastvlm, fastvlm whose rows stay to the end, transformers
unpatched.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput

import fastvlm
from benchmarks import steps
from benchmarks.demo.workload import random_workload
from fastvlm.cpu.step import timed
from fastvlm.generate.head import Head
from fastvlm.generate.steps import Steps
from fastvlm.loading.random_florence2 import load_photo
from fastvlm.patching.generation import OwnLoop

OURS, STAY, THEIRS = "fastvlm", "fastvlm, all rows stay", "transformers"
PHOTOS, BEAMS, SEED = 8, 3, 5
# tokens of the shortest and the longest caption
SHORTEST, LONGEST = 8, 64
_FIRST = 40  # the token that stands for photo 0


class EndsAt(StoppingCriteria):
    """Row by row: the photo whose sign is the second token ends after so many new ones."""

    by_row = True

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] - 2 >= self.lengths[input_ids[:, 1] - _FIRST]


def ends_case(rounds: int, tiny: bool) -> dict[str, Any]:
    """The decoding part alone: the encoder has run."""
    photo, _ = load_photo(None)
    work = random_workload(photo, beams=BEAMS, new_tokens=LONGEST, tiny=tiny)
    model, draw = work.model, random.Random(SEED)
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(PHOTOS)]
    pixels = torch.cat([work.inputs["pixel_values"].roll(37 * i, -1) for i in range(PHOTOS)])
    prompt = {name: work.inputs[name].repeat(PHOTOS, 1) for name in ("input_ids", "attention_mask")}
    start = torch.full((PHOTOS, 2), model.generation_config.decoder_start_token_id or 2)
    start[:, 1] = torch.arange(_FIRST, _FIRST + PHOTOS)
    with torch.no_grad():
        states = model(
            **prompt, pixel_values=pixels, decoder_input_ids=start[:, :1], use_cache=False
        ).encoder_last_hidden_state
    wish = {
        **{k: v for k, v in work.settings.items() if k != "min_new_tokens"},
        "num_return_sequences": 1, "eos_token_id": None,
    }  # fmt: skip
    tokens: dict[str, Tensor] = {}

    def run(side: str, new: int = LONGEST) -> float:
        stays = mock.patch.object(Steps, "may_leave", False) if side == STAY else nullcontext()
        with stays:
            begun = time.perf_counter()
            tokens[side] = model.generate(
                encoder_outputs=BaseModelOutput(states),
                attention_mask=prompt["attention_mask"],
                decoder_input_ids=start,
                stopping_criteria=StoppingCriteriaList([EndsAt(lengths)]),
                **{**wish, "max_new_tokens": new},
            )
            return time.perf_counter() - begun

    seconds = in_turns(
        model, {side: lambda s=side: run(s) for side in (OURS, STAY, THEIRS)}, rounds
    )
    medians = {side: statistics.median(found) for side, found in seconds.items()}
    return {
        "case": f"decoding alone, {PHOTOS} photos, {BEAMS} beams, ends drawn from {SHORTEST} to "
        f"{LONGEST} tokens",
        "model": work.facts["model"],
        "lengths": lengths,
        "seconds": {side: round(value, 4) for side, value in medians.items()},
        "rounds_s": {side: [round(s, 4) for s in found] for side, found in seconds.items()},
        "ratio": {s: round(v / medians[OURS], 3) for s, v in medians.items() if s != OURS},
        "identical_tokens": all(torch.equal(t, tokens[OURS]) for t in tokens.values()),
    }


def in_turns(
    model: Any, runs: dict[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each side, one after the other in each round; the first round is a warm-up."""
    found: dict[str, list[float]] = {side: [] for side in runs}
    for number in range(rounds + 1):
        for side, run in runs.items():
            fastvlm.unpatch(model)
            if side != THEIRS:
                fastvlm.patch(model)
            seconds = run()
            if number:
                found[side].append(seconds)
    fastvlm.unpatch(model)
    return found


@contextmanager
def kernels_timed() -> Iterator[Callable[[], float]]:
    """Inside, the seconds that kernels have taken so far; of the program's those at the end."""
    head = 0.0

    def noted(name: str) -> Any:
        method = getattr(Head, name)

        def run(*args: Any) -> Any:
            nonlocal head
            begun = time.perf_counter()
            try:
                return method(*args)
            finally:
                head += time.perf_counter() - begun

        return mock.patch.object(Head, name, run)

    with noted("best"), noted("logits"), timed() as inside:
        yield lambda: head + sum(inside.values())


def loop_case(rounds: int, tiny: bool, beams: int) -> dict[str, Any]:
    """Milliseconds of a step, of its kernels, and what is left."""
    decoder = steps.random_captioning(tiny)
    decoder.settings |= {"num_beams": beams, "num_return_sequences": 1}
    # as Florence-2's generation_config has it, with no_repeat_ngram_size and early_stopping
    decoder.settings |= {"forced_bos_token_id": 0, "forced_eos_token_id": 2}
    if beams == 1:
        decoder.settings.pop("early_stopping", None)
    fastvlm.patch(decoder.model)

    def once(tokens: int) -> tuple[float, float]:
        with kernels_timed() as kernels:
            whole = decoder(tokens)
        return whole, kernels()

    ours: list[tuple[float, float]] = []
    theirs: list[float] = []
    kept: list[Tensor] = []
    for number in range(rounds + 1):
        short, long = once(steps.SHORT), once(steps.LONG)
        kept.append(decoder.tokens)  # type: ignore[arg-type]
        with mock.patch.object(OwnLoop, "_wants_another_loop", return_value=True):
            other = decoder.step()
            kept.append(decoder.tokens)  # type: ignore[arg-type]
        if number:
            span = steps.LONG - steps.SHORT
            ours.append(((long[0] - short[0]) / span, (long[1] - short[1]) / span))
            theirs.append(other)
    fastvlm.unpatch(decoder.model)
    left = [whole - kernels for whole, kernels in ours]
    return {
        "case": f"a step of the loop, {beams} beams" if beams > 1 else "a step of the loop, greedy",
        "ms": {
            "step": _ms(statistics.median(whole for whole, _ in ours)),
            "kernels": _ms(statistics.median(kernels for _, kernels in ours)),
            "loop without kernels": _ms(statistics.median(left)),
            "step with transformers' loop": _ms(statistics.median(theirs)),
        },
        "rounds_ms": {"loop without kernels": list(map(_ms, left)), "step with transformers' loop":
                      list(map(_ms, theirs))},
        "identical_tokens": all(torch.equal(tokens, kept[0]) for tokens in kept),
    }  # fmt: skip


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def cases(rounds: int, tiny: bool) -> list[dict[str, Any]]:
    return [
        loop_case(rounds, tiny, beams=3),
        loop_case(rounds, tiny, beams=1),
        ends_case(rounds, tiny),
    ]


def told(case: dict[str, Any]) -> str:
    figures = f"{case['seconds']} s; {case['ratio']}x" if "seconds" in case else f"{case['ms']} ms"
    return f"{case['case']}: {figures}; tokens the same: {case['identical_tokens']}"
