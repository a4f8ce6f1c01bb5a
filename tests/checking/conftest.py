from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import FAMILIES, Family

from fastvlm.checking import check as checking


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Each family of tiny models in turn."""
    return FAMILIES[request.param]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One timed round, and one thread: what takes how long says nothing here."""
    monkeypatch.setattr(checking, "ROUNDS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
