from __future__ import annotations

import pytest
from small import Batch, batch, build

from fastvlm.florenz import FlorenzForConditionalGeneration


@pytest.fixture(params=["0.4B", "3.5B"], ids=["florence-decoder", "gemma-decoder"])
def model(request: pytest.FixtureRequest) -> FlorenzForConditionalGeneration:
    """Both structures in turn, small, in eval mode."""
    return build(request.param)


@pytest.fixture
def inputs(model: FlorenzForConditionalGeneration) -> Batch:
    return batch(model)
