from __future__ import annotations

import pytest
from speakers import Speaker, speaker

import fastvlm

KINDS = ["florence2", "florenz-bart", "florenz-gemma"]


@pytest.fixture(params=KINDS)
def plain(request: pytest.FixtureRequest) -> Speaker:
    """Each kind of captioner in turn, as it comes."""
    return speaker(request.param)


@pytest.fixture(params=["plain", "patched"])
def told(request: pytest.FixtureRequest, plain: Speaker) -> Speaker:
    """The same captioner, patched or not; `plain` beside it is never patched."""
    if request.param == "plain":
        return plain
    # built anew and equal: builders draw from fixed seeds
    patched = speaker(request.node.callspec.params["plain"])
    fastvlm.patch(patched.model)
    return patched
