from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small import Batch, batch, build

from fastvlm.florenz import FlorenzForConditionalGeneration


@pytest.fixture(params=["0.4B", "3.5B"], ids=["florence-decoder", "gemma-decoder"])
def model(request: pytest.FixtureRequest) -> FlorenzForConditionalGeneration:
    """Both structures in turn, small, in eval mode."""
    return build(request.param)


@pytest.fixture
def inputs(model: FlorenzForConditionalGeneration) -> Batch:
    return batch(model)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and threads that spin slow their neighbours down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
