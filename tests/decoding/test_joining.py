"""Images that come into a decoding loop and leave it find what each finds alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from speakers import Speaker, pixels, speaker

import fastvlm
from fastvlm.compat.versions import attention_refused
from fastvlm.decoding.rows import Rows
from fastvlm.decoding.writer import Asked, Writer, Written
from fastvlm.generate import lean
from fastvlm.generate.feed import Arrival, CannotJoin

if attention_refused() is not None:
    pytest.skip(str(attention_refused()), allow_module_level=True)

KINDS = ("florence2", "florenz-bart", "florenz-gemma")
# prompts and beginnings of several lengths
ASKED = (
    Asked("What does the image describe?", "Das Bild zeigt"),
    Asked("What does the image describe?"),
    Asked("Describe", "photo"),
)


@pytest.fixture(scope="module")
def speakers() -> dict[str, Speaker]:
    made = {kind: speaker(kind) for kind in KINDS}
    for one in made.values():
        fastvlm.patch(one.model)
    return made


class Script:
    """A feed: picture n, asked some of ASKED, comes when `comes[n]` steps were made since the loop
    began, or nobody is left. unwanted: by picture the steps after which nobody wants it."""

    def __init__(self, writer: Writer, plan: list[tuple[int, tuple[int, ...]]]) -> None:
        self.writer, self.plan = writer, plan
        self.images = pixels(len(plan))
        self.found: dict[tuple[int, int], list[Written]] = {}
        self.unwanted: dict[int, int] = {}
        self.steps, self.most, self.next = 0, 0, 0
        self.ended: list[tuple[int, int]] = []  # picture and step
        self.rest: list[Arrival] = []

    def bring(self) -> Arrival:
        number, self.next = self.next, self.next + 1
        asked = [ASKED[i] for i in self.plan[number][1]]
        return self.writer.arrival(self.images[number : number + 1], asked, [number])

    def run(self) -> None:
        while self.rest or self.next < len(self.plan):
            first, rest = (self.rest.pop() if self.rest else self.bring()).split()
            self.rest += [rest] if rest is not None else []
            self.writer.serve(first, self)

    def wants(self, tag: Any) -> bool:
        return self.steps < self.unwanted.get(tag[0], 10**9)

    def done(self, tag: Any, found: list[tuple[list[int], float]]) -> None:
        assert tag not in self.found
        self.found[tag] = self.writer.written(found, tag[1])
        self.ended.append((tag[0], self.steps))

    def take(self, searches: int) -> Arrival | None:
        self.most = max(self.most, searches)
        if self.rest:
            return self.rest.pop()
        if self.next < len(self.plan) and (self.plan[self.next][0] <= self.steps or not searches):
            return self.bring()
        self.steps += 1
        return None


def alone(writer: Writer, images: Any, plan: Any, number: int) -> list[Written]:
    asked = [ASKED[i] for i in plan[number][1]]
    return [one for each in asked for one in writer.write(images[number : number + 1], [each])]


def check(
    one: Speaker, script: Script, settings: dict[str, Any], sides: tuple[bool, ...] = (True, False)
) -> None:
    """Against a call for each picture and question, patched (True) or by transformers' own loop."""
    for patched in sides:
        if not patched:
            fastvlm.unpatch(one.model)
        try:
            writer = writer_of(one, settings)
            for number in range(len(script.plan)):
                if number in script.unwanted:
                    continue
                want = alone(writer, script.images, script.plan, number)
                got = [
                    w for p in range(len(script.plan[number][1])) for w in script.found[number, p]
                ]
                assert [w.tokens for w in got] == [w.tokens for w in want], (number, patched)
                assert [w.score for w in got] == pytest.approx(
                    [w.score for w in want], abs=2e-4, rel=1e-5
                )
        finally:
            fastvlm.patch(one.model)


def writer_of(one: Speaker, settings: dict[str, Any]) -> Writer:
    wish = {"eos_token_id": one.ends, "no_repeat_ngram_size": 3, **settings}
    beams, new = wish.pop("num_beams"), wish.pop("max_new_tokens")
    return Writer(
        one.model, one.processor, one.tokenizer, num_beams=beams, max_new_tokens=new,
        generate_kwargs=wish,
    )  # fmt: skip


# they come while others decode: one at once, two together, one after all have left
PLAN = [(0, (0, 1)), (2, (1,)), (2, (2, 0)), (7, (0, 1, 2)), (9, (1,)), (200, (2,))]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_who_joins_finds_what_it_finds_alone(
    kind: str, beams: int, speakers: dict[str, Speaker]
) -> None:
    one = speakers[kind]
    settings = {"num_beams": beams, "max_new_tokens": 20, "min_new_tokens": 3}
    if beams > 1:
        settings["early_stopping"] = True
    script = Script(writer_of(one, settings), PLAN)
    script.run()
    assert script.most > 3  # they were together
    steps = [step for _, step in script.ended]
    assert len(set(steps)) > 3  # and left one after the other
    check(one, script, settings)


def drawn(number: int) -> tuple[str, dict[str, Any], list[tuple[int, tuple[int, ...]]]]:
    draw = random.Random(number)
    beams = draw.choice([1, 2, 3])
    settings: dict[str, Any] = {
        "num_beams": beams, "max_new_tokens": draw.choice([1, 2, 9, 24, 24]),
        "no_repeat_ngram_size": draw.choice([0, 2, 3]),
    }  # fmt: skip
    optional = {
        "min_new_tokens": draw.choice([2, 6]), "min_length": draw.choice([4, 9]),
        "forced_eos_token_id": 2, "forced_bos_token_id": 4, "suppress_tokens": [20, 21, 22],
        "begin_suppress_tokens": [30, 31, 2],
    }  # fmt: skip
    for name in draw.sample(sorted(optional), draw.choice([0, 1, 2, 3])):
        settings[name] = optional[name]
    if beams > 1:
        settings |= {
            "early_stopping": draw.choice([True, False, "never"]),
            "length_penalty": draw.choice([1.0, 0.0, -1.0, 2.5]),
            "num_return_sequences": draw.choice([1, beams]),
        }
    plan, now = [], 0
    for _ in range(draw.choice([3, 4])):
        plan.append((now, tuple(draw.sample(range(3), draw.choice([1, 1, 2, 3])))))
        now += draw.choice([0, 0, 1, 3, 10])
    return draw.choice(KINDS), settings, plan


@pytest.mark.turns(12)
@pytest.mark.parametrize("number", range(48))
def test_any_settings_and_any_times(number: int, speakers: dict[str, Speaker]) -> None:
    kind, settings, plan = drawn(number)
    script = Script(writer_of(speakers[kind], settings), plan)
    script.run()
    check(speakers[kind], script, settings, sides=(False,))


def test_nobody_waits_for_who_is_not_wanted(speakers: dict[str, Speaker]) -> None:
    """A search that nobody wants any more leaves between two tokens, and takes nothing along."""
    one = speakers["florence2"]
    settings = {"num_beams": 2, "max_new_tokens": 16, "min_new_tokens": 16}
    script = Script(writer_of(one, settings), [(0, (0,)), (0, (1, 2)), (1, (0,)), (4, (1,))])
    script.unwanted = {0: 3, 1: 5}
    script.run()
    assert {number for number, _ in script.found} == {2, 3}
    check(one, script, settings)


@pytest.mark.turns(3)
def test_places_and_positions_are_used_again(
    speakers: dict[str, Speaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it runs: keys of images, rows and positions of the cache stay as many as decode
    at once, and what lay there before is read by nobody."""
    held, dropped = [], []
    call, drop = lean.Lean.__call__, Rows.drop

    def noted_drop(self: Any, count: int) -> None:
        dropped.append(count)
        drop(self, count)

    monkeypatch.setattr(Rows, "drop", noted_drop)

    def noted(self: Any, tokens: Any) -> Any:
        layer = self.step.layers[0]
        keys = self.cache.cross_attention_cache.layers[0].packed[0]
        # whatever nobody reads is poison
        table = self._kept.table[:, : layer.filled]
        read = torch.zeros(layer.k.shape[:2], dtype=torch.bool)
        for position in range(layer.filled):
            rows = table[:, position]
            read[rows[rows >= 0].long(), position] = True
        layer.k[~read] = float("nan")
        layer.v[~read] = float("nan")
        if self._slots is not None:
            for place in range(len(self._slots._lengths)):
                if place not in self._images_read():
                    first = place * self._slots.size
                    keys[first : first + self._slots.size] = float("nan")
        held.append((*layer.k.shape[:2], keys.shape[0]))
        return call(self, tokens)

    monkeypatch.setattr(lean.Lean, "__call__", noted)
    monkeypatch.setattr(
        lean.Lean, "_images_read", lambda self: {i // 2 for i in self._images}, raising=False
    )
    one = speakers["florence2"]
    settings = {"num_beams": 2, "max_new_tokens": 12, "min_new_tokens": 6}
    plan = [(3 * n, (n % 3,)) for n in range(60)]
    script = Script(writer_of(one, settings), plan)
    script.run()
    assert script.steps > 170
    assert script.most <= 8
    assert len(dropped) > 1
    rows, positions, keys = zip(*held)
    assert max(rows) <= 32
    assert max(positions) <= 200
    longest = max(len(script.writer.arrival(script.images[:1], [a], [0]).states[0]) for a in ASKED)
    assert max(keys) <= 16 * longest
    check(one, script, settings, sides=(True,))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_sample": True}, "it draws tokens"),
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor sees the scores"),
        ({"max_time": 60.0}, "its time is limited"),
        ({"use_cache": False}, "it keeps no cache"),
    ],
)
def test_what_is_of_one_batch_says_so(
    settings: dict[str, Any], reason: str, speakers: dict[str, Speaker]
) -> None:
    writer = writer_of(speakers["florence2"], {"num_beams": 1, "max_new_tokens": 4, **settings})
    with pytest.raises(CannotJoin, match=reason):
        Script(writer, PLAN).run()


def test_a_hook_keeps_the_model_in_its_steps(speakers: dict[str, Speaker]) -> None:
    one = speakers["florence2"]
    writer = writer_of(one, {"num_beams": 1, "max_new_tokens": 4})
    handle = one.model.model.register_forward_hook(lambda *args: None)
    try:
        with pytest.raises(CannotJoin, match="does more than its decoder and its head"):
            Script(writer, PLAN).run()
    finally:
        handle.remove()


def test_who_cannot_join_by_what_is_known_before(speakers: dict[str, Speaker]) -> None:
    one = speakers["florence2"]
    usual = {"num_beams": 1, "max_new_tokens": 4}
    assert writer_of(one, usual).cannot_join() is None
    seen = writer_of(one, {**usual, "stopping_criteria": [lambda ids, scores: False]})
    assert seen.cannot_join() == "stopping_criteria sees one batch"
    asked = writer_of(one, {**usual, "stop_strings": ["abc"]}).cannot_join()
    assert asked == "what was asked for is done by a loop of transformers'"
    writer = writer_of(one, usual)
    with fastvlm_unpatched(one.model):
        assert "not patched" in str(writer.cannot_join())


class fastvlm_unpatched:
    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        fastvlm.unpatch(self.model)

    def __exit__(self, *_: object) -> None:
        fastvlm.patch(self.model)
