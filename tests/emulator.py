"""Triton kernels executed without a GPU: every launch, from the compiler's own IR, on CPU tensors.

ttsem reports an access outside of its tensor, a race between program instances and an undefined
result as the failure of the test that launched the kernel.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import fastvlm
from fastvlm import triton as backend
from fastvlm.triton import configs
from fastvlm.triton.configs import Config
from fastvlm.triton.configs.products import sliced, tile


def missing() -> str | None:
    """Why there is no emulator here."""
    for package in ("triton", "ttsem"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (make test-triton installs it)"
    return None


# Blocks so small that the few rows of a test make several of them, with ragged ends; they also
# cost the emulator less than true ones, most of which would be padding
SMALL = {
    "attention_forward": Config({"BLOCK_M": 16, "BLOCK_N": 32}),
    "attention_backward_q": Config({"BLOCK_M": 16, "BLOCK_N": 32}),
    "attention_backward_kv": Config({"BLOCK_M": 32, "BLOCK_N": 16}),
    "cached_attention": Config({"BLOCK_N": 16}),
    # of the persistent grids each program walks over several tiles (see emulated)
    **dict.fromkeys(
        ("geglu_forward", "gelu_forward"),
        sliced(16, 16, 16, warps=1, stages=2, slices=2, group=2, resident=1),
    ),
    **dict.fromkeys(
        ("geglu_backward", "gelu_backward", "low_precision_linear"),
        sliced(16, 16, 16, warps=1, stages=2, slices=2, group=2),
    ),
    "linear_cross_entropy": tile(16, 32, 16, 4, 2),
    "linear_cross_entropy_dlogits": tile(16, 16, 16, 4, 2),
    "linear_cross_entropy_dh": tile(16, 16, 16, 4, 2),
    "linear_cross_entropy_dweight": tile(32, 16, 16, 4, 2),
    "linear_topk": tile(16, 32, 16, 4, 2),
}


@contextlib.contextmanager
def _two_multiprocessors() -> Iterator[None]:
    """A persistent grid that is smaller than the number of tiles in a test."""
    from fastvlm.triton import mlp

    before, mlp.multiprocessors = mlp.multiprocessors, lambda x: 2
    try:
        yield
    finally:
        mlp.multiprocessors = before


@contextlib.contextmanager
def emulated(small: bool = True) -> Iterator[Any]:
    """Inside, ``fastvlm.use("triton")`` serves CPU tensors. Gives ttsem's session, which counts.

    small: with the blocks of SMALL, else with those of the tables.
    """
    from ttsem._fakedriver import unstub_torch_cuda
    from ttsem.sanitize import session

    # cuda_is_cpu would replace attributes of torch.Tensor; our launchers take CPU tensors as such
    with session(source="<pytest>", cuda_is_cpu=False) as counted:
        unstub_torch_cuda()  # PyTorch is asked about the machine as it is
        blocks = configs.replaced(**SMALL) if small else contextlib.nullcontext()
        with backend.on_cpu_tensors(), fastvlm.use("triton"), blocks, _two_multiprocessors():
            yield counted
    assert counted.races_unchecked == 0, "a launch too large to be checked for races: take less"
