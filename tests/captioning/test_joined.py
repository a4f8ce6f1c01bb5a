"""Pictures that join what decodes: they wait for nobody, and nobody's answer changes by it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from counted_waits import Counted, leave_out_the_host
from folders import noise

import fastvlm
from fastvlm.captioning import Captioner, models
from fastvlm.captioning.requests import Deadline
from fastvlm.compat.versions import attention_refused
from fastvlm.generate import lean

if attention_refused() is not None:
    pytest.skip(str(attention_refused()), allow_module_level=True)

BEAMS = 2


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    made = models.random(True, "cpu")
    fastvlm.patch(made.model)
    return made


def captioner(loaded: models.Loaded, tokens: int = 40, **settings: Any) -> Captioner:
    defaults = {"num_beams": BEAMS, "batch_size": 4, "min_new_tokens": tokens}
    settings = {**defaults, **settings}
    return Captioner(loaded.model, loaded.processor, max_new_tokens=tokens, **settings)


def alone(loaded: models.Loaded, picture: Any, tokens: int = 40) -> tuple[int, ...]:
    (one,) = fastvlm.caption(
        loaded.model, loaded.processor, [picture], ["en"], prefixes={"en": ""}, num_beams=BEAMS,
        max_new_tokens=tokens, min_new_tokens=tokens,
    )  # fmt: skip
    return one.tokens


class Steps:
    """The steps of loops: the rows of each, and what is to be done before some of them."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.before: dict[int, Callable[[], Any]] = {}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    found, call = Steps(), lean.Lean.__call__

    def noted(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        if found.before:
            found.before.pop(len(found.rows), lambda: None)()
        found.rows.append(tokens.shape[0])
        return call(self, tokens)

    monkeypatch.setattr(lean.Lean, "__call__", noted)
    yield found
    assert not found.before


def opened(told: Captioner, count: int) -> None:
    """Wait until so many pictures are open, and wait for the model."""
    until = time.monotonic() + 60
    while len(told._waiting._ready) < count and time.monotonic() < until:
        time.sleep(0.002)
    assert len(told._waiting._ready) == count


def test_who_comes_late_joins(loaded: models.Loaded, steps: Steps) -> None:
    futures: list[Any] = []
    with captioner(loaded) as told:
        assert told.why_batched is None

        def more() -> None:
            futures.extend(told.submit(noise(seed)) for seed in (1, 2))
            opened(told, 2)

        steps.before = {10: more}
        first = told.submit(noise(0))
        got = [first.result(60)[0].tokens]
        # it ends as soon as it would alone, while the others go on
        assert len(steps.rows) < 60
        got += [future.result(60)[0].tokens for future in futures]
    assert steps.rows[:10] == [BEAMS] * 10
    assert max(steps.rows) == 3 * BEAMS
    # one after the other they would take three times forty
    assert len(steps.rows) < 60
    assert got == [alone(loaded, noise(seed)) for seed in range(3)]


def test_one_that_nobody_wants_leaves_at_the_next_token(
    loaded: models.Loaded, steps: Steps
) -> None:
    with captioner(loaded, linger=5.0) as told:
        futures = [told.submit(lambda: noise(0), deadline=600), told.submit(noise(1))]
        steps.before = {20: futures[0].cancel}
        assert futures[1].result(60)[0].tokens == alone(loaded, noise(1))
        assert futures[0].cancelled()
    assert steps.rows[19] == 2 * BEAMS
    # its token is on its way; with the next step it is gone
    assert steps.rows[21] == BEAMS


def test_a_deadline_that_passes_between_tokens(loaded: models.Loaded, steps: Steps) -> None:
    with captioner(loaded, linger=5.0) as told:
        requests: list[Any] = []
        enter = told._waiting.enter

        def entered(request: Any, block: bool) -> bool:
            requests.append(request)
            return enter(request, block)

        def passes() -> None:
            requests[0].deadline = Deadline(time.monotonic())

        told._waiting.enter = entered  # type: ignore[method-assign]
        steps.before = {20: passes}
        late, good = told.submit(noise(0), deadline=600), told.submit(noise(1))
        with pytest.raises(TimeoutError, match="the deadline passed before the answer came"):
            late.result(60)
        assert good.result(60)[0].tokens == alone(loaded, noise(1))
    assert steps.rows[21] == BEAMS


def test_a_picture_that_waits_expires_while_others_decode(
    loaded: models.Loaded, steps: Steps
) -> None:
    with captioner(loaded, batch_size=1) as told:
        late: list[Any] = []

        def more() -> None:
            late.append(told.submit(noise(1), deadline=0.01))
            time.sleep(0.02)

        steps.before = {5: more, 9: lambda: done.append(late[0].done())}
        done: list[bool] = []
        first = told.submit(noise(0))
        first.result(60)
        assert done == [True]


def raising(error: Exception) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


def test_a_loop_that_breaks_is_done_again(loaded: models.Loaded, steps: Steps) -> None:
    steps.before = {7: raising(RuntimeError("broken"))}
    with captioner(loaded, linger=5.0) as told, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        futures = [told.submit(noise(seed)) for seed in range(2)]
        got = [future.result(60)[0].tokens for future in futures]
        # the next ones join again
        assert told.why_batched is None
        assert told.submit(noise(2)).result(60)[0].tokens == alone(loaded, noise(2))
    assert got == [alone(loaded, noise(seed)) for seed in range(2)]
    (text,) = [str(one.message) for one in said if one.category is RuntimeWarning]
    assert "are done again, in batches (RuntimeError: broken)" in text


def test_memory_that_runs_out_while_pictures_decode(loaded: models.Loaded, steps: Steps) -> None:
    steps.before = {7: raising(torch.OutOfMemoryError("CUDA out of memory"))}
    with captioner(loaded, linger=5.0) as told:
        futures = [told.submit(noise(seed)) for seed in range(2)]
        got = [future.result(60)[0].tokens for future in futures]
        assert told.batch_limit == 2
    assert got == [alone(loaded, noise(seed)) for seed in range(2)]


def test_a_model_whose_steps_are_watched_decodes_in_batches(loaded: models.Loaded) -> None:
    handle = loaded.model.model.register_forward_hook(lambda *args: None)
    try:
        with captioner(loaded, tokens=6) as told:
            assert told.why_batched is None  # nothing has been seen of it yet
            assert told.submit(noise(1)).result(60)[0].tokens == alone(loaded, noise(1), 6)
            assert told.why_batched == "its forward does more than its decoder and its head"
            assert told.submit(noise(2)).result(60)[0].tokens == alone(loaded, noise(2), 6)
    finally:
        handle.remove()
    made = models.random(True, "cpu")
    with captioner(made, tokens=6) as told:
        assert "not patched" in str(told.why_batched)
        assert told.submit(noise(1)).result(60)[0].tokens == alone(loaded, noise(1), 6)


def test_sentences_that_end_make_room(loaded: models.Loaded, steps: Steps) -> None:
    """Not whole pictures: the next one comes when as many sentences are left as its own."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    german = loaded.processor.tokenizer("Das", add_special_tokens=False).input_ids[0]

    class ShortGerman(StoppingCriteria):
        by_row = True

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            is_german = (input_ids[:, :4] == german).any(1)
            return is_german & (input_ids.shape[1] > 30)

    criteria = StoppingCriteriaList([ShortGerman()])
    with captioner(
        loaded, 60, batch_size=1, languages=["en", "de"], stopping_criteria=criteria
    ) as told:
        assert told.why_batched is None
        late: list[Any] = []

        def more() -> None:
            late.append(told.submit(noise(1), tasks="<OD>"))
            opened(told, 1)

        steps.before = {10: more}
        found = told.submit(noise(0)).result(60)
        (second,) = late
        assert len(second.result(60)) == 1
    lengths = {one.language: len(one.tokens) for one in found}
    assert lengths["de"] < lengths["en"] == 60
    # the second was there while the first still decoded its English
    assert len(steps.rows) < 110


def test_a_loop_waits_for_the_device_once_a_step(loaded: models.Loaded, steps: Steps) -> None:
    counts: list[int] = []
    counted = Counted()
    call = lean.Lean.__call__

    def noted(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        counts.append(counted.found["waits"])
        return call(self, tokens)

    with pytest.MonkeyPatch.context() as patched:
        leave_out_the_host(patched)
        patched.setattr(lean.Lean, "__call__", noted)
        told = captioner(loaded)
        run = told._serve

        def serve(batch: Any) -> None:
            with counted:
                run(batch)

        patched.setattr(told, "_serve", serve)
        told.submit(noise(0)).result(60)
        told.close()
    waits = [after - before for before, after in pairwise(counts)]
    assert len(waits) > 30
    assert set(waits[1:]) == {1}
