from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvlm
from fastvlm.ops import dispatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Fresh random inputs for each test, the same again for the same test."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return value


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory from torch.empty is NaN, so a kernel that leaves some of it unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def on(backend: str) -> Callable[..., Any]:
    """Call an op on the backend of the test.

    A case that the CPU kernels do not serve must refuse with a reason when they are forced; then
    the default choice is tested in its place, which is what a user gets.
    """

    def call(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with fastvlm.use(backend):
            try:
                return op(*args, **kwargs)
            except dispatch.BackendError:
                if backend == "reference":
                    raise
        return op(*args, **kwargs)

    return call


@pytest.fixture
def randn(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Normal values in the dtype under test."""

    def make(*shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        return (torch.randn(*shape) * scale).to(dtype).requires_grad_(grad)

    return make
