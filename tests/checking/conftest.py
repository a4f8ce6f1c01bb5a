from __future__ import annotations

import pytest
from models import FAMILIES, Family

from fastvlm.checking import check as checking


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Each family of tiny models in turn."""
    return FAMILIES[request.param]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One timed round: what takes how long says nothing here."""
    monkeypatch.setattr(checking, "ROUNDS", 1)
