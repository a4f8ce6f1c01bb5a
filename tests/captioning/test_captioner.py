"""fastvlm.Captioner: the answers of fastvlm.caption, whoever shares the batch, and no hanging."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path
from queue import Full
from typing import Any

import numpy as np
import pytest
import torch
from folders import encoded, noise

import fastvlm
from fastvlm.captioning import Captioner, models
from fastvlm.captioning.captioner import ModelError
from fastvlm.decoding.pictures import PictureError


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    made = models.random(True, "cpu")
    fastvlm.patch(made.model)
    return made


def captioner(loaded: models.Loaded, **settings: Any) -> Captioner:
    defaults: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 5}
    return Captioner(loaded.model, loaded.processor, **{**defaults, **settings})


class Gate:
    """Holds the model's tower until it is opened, and notes the batches that it saw."""

    def __init__(self, loaded: models.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self.most: int | None = None
        real = loaded.model.get_image_features

        def features(pixels: torch.Tensor) -> Any:
            self.batches.append(len(pixels))
            self.entered.set()
            assert self.open.wait(60)
            if self.most is not None and len(pixels) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
            return real(pixels)

        monkeypatch.setattr(loaded.model, "get_image_features", features)


@pytest.fixture
def gate(loaded: models.Loaded, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(loaded, monkeypatch)
    yield gate
    gate.open.set()


def test_answers_are_those_of_caption(loaded: models.Loaded, tmp_path: Path) -> None:
    pictures = [noise(seed, 40 + seed) for seed in range(5)]
    pictures[0].save(tmp_path / "0.png")
    forms: list[Any] = [
        tmp_path / "0.png", encoded(pictures[1]), np.asarray(pictures[2]), lambda: pictures[3],
        loaded.processor.image_processor(images=[pictures[4]], return_tensors="pt").pixel_values[0],
    ]  # fmt: skip
    want = fastvlm.caption(
        loaded.model, loaded.processor, pictures, ["en", "de"], num_beams=2, max_new_tokens=5
    )
    with captioner(loaded, languages=["en", "de"]) as told:
        futures = [told.submit(form) for form in forms]
        got = [answer for future in futures for answer in future.result(60)]
    assert [(a.language, a.text, a.tokens) for a in got] == [
        (c.language, c.text, c.tokens) for c in want
    ]
    assert [a.score for a in got] == pytest.approx([c.score for c in want], abs=1e-4)


def test_each_picture_may_be_asked_something_else(loaded: models.Loaded) -> None:
    with captioner(loaded, tasks=["<CAPTION>", "<OD>"]) as told:
        both = told.submit(noise(1))
        one = told.submit(noise(1), tasks="<OD>")
        german = told.submit(noise(1), tasks=["<CAPTION>"], languages=["de"])
        assert [(a.task, a.language) for a in both.result(60)] == [
            ("<CAPTION>", None),
            ("<OD>", None),
        ]
        assert both.result()[1].boxes == []
        assert [a.text for a in one.result(60)] == [both.result()[1].text]
        assert [(a.task, a.language) for a in german.result(60)] == [("<CAPTION>", "de")]


def test_what_waits_is_encoded_together(loaded: models.Loaded, gate: Gate) -> None:
    """As much of it as there is room for beside what decodes; in batches, all that one holds."""
    with captioner(loaded, batch_size=3) as told:
        first = told.submit(noise(0))
        assert gate.entered.wait(60)
        rest = [told.submit(noise(seed)) for seed in range(1, 6)]
        while told._waiting._ready.__len__() < 5:
            time.sleep(0.01)
        gate.open.set()
        wait([first, *rest], 60)
    assert gate.batches[:2] == [1, 2] if told.why_batched is None else [1, 3]
    assert sum(gate.batches) == 6
    assert max(gate.batches) <= 3


def test_no_more_than_most_waiting_wait(loaded: models.Loaded, gate: Gate) -> None:
    with captioner(loaded, batch_size=1, most_waiting=2) as told:
        first = told.submit(noise(0))
        assert gate.entered.wait(60)
        waiting = [told.submit(noise(seed)) for seed in (1, 2)]
        with pytest.raises(Full, match="2 pictures wait already"):
            told.submit(noise(3), block=False)
        with pytest.raises(TimeoutError, match="before there was room"):
            told.submit(noise(3), deadline=0.05)
        # who gives up makes room at once
        waiting[0].cancel()
        late = told.submit(noise(3), block=False)
        gate.open.set()
        assert len(late.result(60)) == len(first.result(60)) == 1
        with pytest.raises(CancelledError):
            waiting[0].result()
        done, _ = wait(waiting, 60)
        assert done == set(waiting)
    assert gate.batches == [1, 1, 1]


def test_deadlines(loaded: models.Loaded, gate: Gate) -> None:
    with captioner(loaded, batch_size=1) as told:
        first = told.submit(noise(0), deadline=0.2)
        assert gate.entered.wait(60)
        second = told.submit(noise(1), deadline=0.2)
        third = told.submit(noise(2), deadline=600)
        time.sleep(0.3)
        gate.open.set()
        for future in (first, second):
            with pytest.raises(TimeoutError, match="the deadline passed before the answer came"):
                future.result(60)
        assert len(third.result(60)) == 1
    assert gate.batches == [1, 1]


def test_a_batch_that_nobody_wants_ends(loaded: models.Loaded) -> None:
    """Its steps stop; the next picture is not kept waiting for them."""
    steps: list[int] = []
    futures: list[Any] = []

    def criterion(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        steps.append(ids.shape[1])
        if len(steps) == 3:
            for future in futures:
                assert future.cancel()
        return torch.zeros(len(ids), dtype=torch.bool)

    from transformers import StoppingCriteriaList

    criteria = StoppingCriteriaList([criterion])
    with captioner(loaded, max_new_tokens=200, stopping_criteria=criteria) as told:
        futures.append(told.submit(noise(1)))
        wait(futures, 60)
        told.close()
    assert len(steps) == 3


def test_memory_that_runs_out_halves_the_batch(loaded: models.Loaded, gate: Gate) -> None:
    gate.most = 2
    with captioner(loaded, batch_size=8) as told:
        blocker = told.submit(noise(9))
        assert gate.entered.wait(60)
        futures = [told.submit(noise(seed)) for seed in range(8)]
        while told._waiting._ready.__len__() < 8:
            time.sleep(0.01)
        gate.open.set()
        got = [future.result(60)[0].tokens for future in futures]
        assert blocker.result()
        assert told.batch_limit == 2
    want = fastvlm.caption(
        loaded.model, loaded.processor, [noise(seed) for seed in range(2)], ["en"],
        prefixes={"en": ""}, num_beams=2, max_new_tokens=5,
    )  # fmt: skip
    assert got[:2] == [c.tokens for c in want]
    assert max(gate.batches[2:]) <= 4


def test_one_picture_too_many_for_memory_is_said(loaded: models.Loaded, gate: Gate) -> None:
    gate.most = 0
    gate.open.set()
    with captioner(loaded) as told, pytest.raises(ModelError, match="out of memory"):
        told.submit(noise(0)).result(60)


def test_a_failing_model_fails_alone(
    loaded: models.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loaded.model.get_image_features

    def features(pixels: torch.Tensor) -> Any:
        if bool((pixels > 7).any()):
            raise RuntimeError("seven is too much")
        return real(pixels)

    monkeypatch.setattr(loaded.model, "get_image_features", features)
    pixels = loaded.processor.image_processor(images=[noise(1)], return_tensors="pt").pixel_values[
        0
    ]
    with captioner(loaded, batch_size=4, linger=1.0) as told:
        futures = [told.submit(p) for p in (pixels, pixels + 8, pixels, pixels)]
        with pytest.raises(ModelError, match="seven is too much"):
            futures[1].result(60)
        for index in (0, 2, 3):
            assert len(futures[index].result(60)) == 1


def test_what_is_no_picture_is_said_and_nobody_else_waits(loaded: models.Loaded) -> None:
    with captioner(loaded) as told:
        bad = [told.submit(b"nothing"), told.submit("missing.png"), told.submit(lambda: 1 / 0)]
        good = told.submit(noise(1))
        for future, kind in zip(bad, (PictureError, PictureError, ZeroDivisionError)):
            with pytest.raises(kind):
                future.result(60)
        with pytest.raises(ValueError, match="picture must be a path"):
            told.submit(np.zeros((2, 2))).result(60)
        assert good.result(60)


def test_many_threads(loaded: models.Loaded) -> None:
    pictures = [noise(seed) for seed in range(4)]
    want: dict[int, Any] = {}
    wrong: list[Any] = []
    with captioner(loaded, most_waiting=3) as told:
        for index, picture in enumerate(pictures):
            want[index] = told.submit(picture).result(60)[0].tokens

        def client(number: int) -> None:
            for turn in range(4):
                index = (number + turn) % 4
                future = told.submit(pictures[index])
                if turn % 3 == number % 3:
                    future.cancel()
                elif future.result(60)[0].tokens != want[index]:
                    wrong.append(index)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not wrong
    assert not told._waiting._inside


def test_close_answers_or_drops(loaded: models.Loaded, gate: Gate) -> None:
    gate.open.set()
    told = captioner(loaded)
    futures = [told.submit(noise(seed)) for seed in range(3)]
    told.close()
    assert all(future.result(0) for future in futures)
    told.close()
    with pytest.raises(RuntimeError, match="it is closed"):
        told.submit(noise(1))
    gate.open.clear()
    gate.entered.clear()
    told = captioner(loaded)
    futures = [told.submit(noise(seed)) for seed in range(3)]
    assert gate.entered.wait(60)
    closing = threading.Thread(target=told.close, kwargs={"cancel": True})
    closing.start()
    time.sleep(0.05)
    gate.open.set()
    closing.join(60)
    assert not closing.is_alive()
    assert all(future.done() for future in futures)
    assert any(future.cancelled() for future in futures)


def test_pixels_are_let_go_of(loaded: models.Loaded, gate: Gate) -> None:
    """Answered, cancelled or refused, without a run of the garbage collector."""
    seen = []

    def photo() -> torch.Tensor:
        pixels = torch.zeros(3, 96, 96)
        seen.append(weakref.ref(pixels))
        return pixels

    gc.disable()
    try:
        with captioner(loaded, batch_size=1) as told:
            futures = [told.submit(photo) for _ in range(3)]
            assert gate.entered.wait(60)
            while len(told._waiting._ready) < 2:
                time.sleep(0.01)
            futures[2].cancel()
            gate.open.set()
            wait(futures, 60)
            assert [future.cancelled() for future in futures] == [False, False, True]
        assert [ref() for ref in seen] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number, 1 or more, or None"),
        ({"most_waiting": 0}, "most_waiting must be a whole number"),
        ({"workers": 1.5}, "workers must be a whole number"),
        ({"linger": -1}, "linger must be seconds"),
        ({"tasks": []}, "tasks must be one task or more"),
        ({"tasks": "<NOTHING>"}, "tasks must be a task of <CAPTION>"),
        ({"languages": ["xx"]}, "languages must be of en"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number"),
        ({"input_ids": 3}, "input_ids must be left out"),
    ],
)
def test_what_is_refused_is_named(loaded: models.Loaded, given: Any, message: str) -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match=message):
        captioner(loaded, **given)
    assert threading.active_count() == before


def test_a_task_that_finds_things_needs_a_processor_that_can(loaded: models.Loaded) -> None:
    from types import SimpleNamespace

    words = SimpleNamespace(tokenizer=loaded.processor.tokenizer, image_processor=None)
    with pytest.raises(ValueError, match="processor must be one with post_process_generation"):
        Captioner(loaded.model, words, tasks="<OD>")
