from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from models import FAMILIES, Family

from fastvlm.patching import interposed
from fastvlm.run import build


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Each family of tiny models in turn."""
    return FAMILIES[request.param]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was made of each stack: a step that is written down, or None."""
    made: list[Any] = []
    run = build.build_step
    monkeypatch.setattr(build, "build_step", lambda *args: made.append(run(*args)) or made[-1])
    return made


@pytest.fixture
def young_collector() -> Iterator[None]:
    """gc.collect() looks at what the test makes, not at all modules of three libraries."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def told_anew() -> Iterator[None]:
    """Warnings come once for a kind of stack: each test is the first to hear them."""
    interposed._told.clear()
    yield
    interposed._told.clear()
