from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from models import FAMILIES, Family

from fastvlm.patching import interposed


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Each family of tiny models in turn."""
    return FAMILIES[request.param]


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
