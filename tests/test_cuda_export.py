"""The CUDA library beside a CUDA build of PyTorch, on a machine that may have no GPU.

It is built, loaded, and its ops are traced and exported on tensors without memory. CONTRIBUTING
says how to get such a PyTorch; with its CPU build there is nothing to load the library into.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvlm import Layout, ops
from fastvlm.cuda import library
from fastvlm.ops.attention import arguments_of

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built without CUDA"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH"),
]


@pytest.fixture(scope="module")
def loaded() -> None:
    """The library where the package looks for it."""
    library.build()
    library.reason.cache_clear()


@pytest.mark.usefixtures("loaded")
def test_it_loads_and_defines_its_ops() -> None:
    assert library.reason() is None
    for name in (
        "cross_attention", "cached_attention", "few_rows_linear", "few_rows_gated", "linear_topk",
        "rms_norm", "residual_rms_norm", "residual_layer_norm",
    ):  # fmt: skip
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastvlm_cuda::{name}", "CUDA")


LENGTHS = [4, 4], [50, 577], [0, 1]
CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "rms_norm": (ops.rms_norm, [(4, 64), (64,)], [(4, 64)]),
    "residual_layer_norm": (
        ops.residual_layer_norm, [(4, 64), (4, 64), (64,), (64,)], [(4, 64)],
    ),
    "geglu_mlp": (ops.geglu_mlp, [(4, 64), (96, 64), (96, 64), (64, 96)], [(4, 64)]),
    "linear_topk": (
        lambda h, w: ops.linear_topk(h, w, 5), [(4, 64), (1000, 64)], [(4, 5), (4, 5), (4,)],
    ),
    "cached_attention": (
        lambda q, k, v, lengths: ops.cached_attention(q, k, v, lengths),
        [(4, 4, 64), (4, 9, 2, 64), (4, 9, 2, 64), (4,)], [(4, 4, 64)],
    ),
}  # fmt: skip


def fakes(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """On a GPU that need not be there; a shape of one number is of integers where it is last."""
    made = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
    if len(shapes[-1]) == 1 and len(shapes[0]) == 3:
        made[-1] = made[-1].int()
    return made


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("name", CASES)
def test_ops_are_traced(name: str) -> None:
    function, given, expected = CASES[name]
    with FakeTensorMode(), torch.no_grad():
        found = function(*fakes(given))
        found = found if isinstance(found, tuple) else (found,)
        assert [tuple(x.shape) for x in found] == expected
        assert all(x.device.type == "cuda" for x in found)


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("name", CASES)
def test_ops_are_exported(name: str) -> None:
    function, given, _ = CASES[name]

    class Step(nn.Module):
        def forward(self, *args: Tensor) -> Any:
            return function(*args)

    with FakeTensorMode(), torch.no_grad():
        program = torch.export.export(Step(), tuple(fakes(given)), strict=False)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert f"fastvlm.{name}.default" in called


@pytest.mark.usefixtures("loaded")
def test_cross_attention_over_a_layout() -> None:
    layout = Layout.from_lengths(*LENGTHS)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        q, k = fakes([(8, 4, 64), (627, 2, 64)])
        where = [x.cuda() if isinstance(x, Tensor) else x for x in arguments_of(layout)]
        out, stats = torch.ops.fastvlm.cross_attention(q, k, k, *where, False, 0, 0.125, 0.0, 0.0)
    assert (tuple(out.shape), tuple(stats.shape)) == ((8, 4, 64), (8, 4, 2))
