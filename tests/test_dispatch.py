"""Which backend serves a call: the default, a forced one, and the reasons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import emulator
import pytest
import torch

import fastvlm
from fastvlm import ops
from fastvlm.cpu import bf16
from fastvlm.cpu.common import unavailable
from fastvlm.ops import dispatch
from fastvlm.ops.dispatch import BackendError, Kernel

# what the CPU extension must serve when it is there: a kernel that stops serving is a failure
EXPECTED_CPU = (
    "linear",
    "low_precision_linear",
    "gelu_mlp",
    "geglu_mlp",
    "cross_attention",
    "self_attention",
    "cached_attention",
    "rms_norm",
    "residual_rms_norm",
    "residual_layer_norm",
    "rope",
    "linear_cross_entropy",
    "linear_topk",
)
# DaViT's, whose blocks run on a GPU as transformers wrote them, on the parts that are patched, int8
# arithmetic, and what joins two attentions
CPU_ONLY = (
    "residual_linear",
    "residual_gelu_mlp",
    "window_attention",
    "channel_attention",
    "depthwise_conv_norm",
    "int8_linear",
    "int8_gelu_mlp",
    "merge_attention",
)
# by CPUs that have the instructions
NARROW = ("bf16_linear", "bf16_gelu_mlp")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def call(op: str, dtype: torch.dtype, rows: int = 3) -> Any:
    x = torch.randn(rows, 16).to(dtype)
    w = torch.randn(16, 16).to(dtype)
    heads = torch.randn(rows, 2, 8).to(dtype)
    layout = fastvlm.Layout.from_lengths([rows])
    cache = torch.randn(rows, 4, 2, 8).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "linear": lambda: ops.linear(x, w),
        "low_precision_linear": lambda: ops.low_precision_linear(x, *ops.quantize_rows(w)),
        "gelu_mlp": lambda: ops.gelu_mlp(x, w, None, w, None),
        "geglu_mlp": lambda: ops.geglu_mlp(x, w, w, w),
        "cross_attention": lambda: ops.cross_attention(heads, heads, heads, layout),
        "self_attention": lambda: ops.self_attention(heads, heads, heads, layout),
        "cached_attention": lambda: ops.cached_attention(
            heads, cache, cache, torch.full((rows,), 4)
        ),
        "merge_attention": lambda: ops.merge_attention(
            heads, heads[..., 0].to(wide), heads, heads[..., 1].to(wide)
        ),
        "rms_norm": lambda: ops.rms_norm(x, w[0]),
        "residual_rms_norm": lambda: ops.residual_rms_norm(x, x, w[0]),
        "residual_layer_norm": lambda: ops.residual_layer_norm(x, x, w[0], w[0]),
        "rope": lambda: ops.rope(heads, heads, heads[:, 0], heads[:, 0]),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(x, w, torch.arange(rows)),
        "linear_topk": lambda: ops.linear_topk(x, w, 2),
        "residual_linear": lambda: ops.residual_linear(x, w, None, x),
        "residual_gelu_mlp": lambda: ops.residual_gelu_mlp(x, w, None, w, None, x),
        "window_attention": lambda: ops.window_attention(x[None, None, :, :15], 5, 2),
        "channel_attention": lambda: ops.channel_attention(x[None, :, :15], 5),
        "bf16_linear": lambda: ops.bf16_linear(x, w.bfloat16()),
        "bf16_gelu_mlp": lambda: ops.bf16_gelu_mlp(
            x, w.bfloat16(), None, None, w.bfloat16(), None, None
        ),
        "int8_linear": lambda: ops.int8_linear(x, *ops.quantize_rows(w)),
        "int8_gelu_mlp": lambda: ops.int8_gelu_mlp(
            x, *ops.quantize_rows(w), None, *ops.quantize_rows(w), None
        ),
        "depthwise_conv_norm": lambda: ops.depthwise_conv_norm(
            x[None, None], w[:, :9].reshape(16, 1, 3, 3), None, w[0], w[0]
        ),
    }[op]()


def test_every_op_has_a_cpu_kernel() -> None:
    assert {*EXPECTED_CPU, *CPU_ONLY, *NARROW} == set(ops.__all__) - {"quantize_rows"}


@pytest.mark.parametrize("op", [*EXPECTED_CPU, *CPU_ONLY, *NARROW])
def test_the_cpu_kernels_serve_what_they_promise(op: str) -> None:
    if unavailable():
        pytest.skip(f"no CPU extension: {unavailable()}")
    if op in NARROW and bf16.unavailable():
        with fastvlm.use("cpu"), pytest.raises(BackendError, match="AMX or AVX-512 BF16"):
            call(op, torch.float32)
        return
    for dtype in DTYPES.values():
        with fastvlm.use("cpu"):
            call(op, dtype)


@pytest.mark.parametrize("op", [*EXPECTED_CPU, *CPU_ONLY])
def test_what_they_do_not_serve_goes_to_the_reference(op: str) -> None:
    if unavailable():
        pytest.skip(f"no CPU extension: {unavailable()}")
    call(op, torch.float64)
    with fastvlm.use("cpu"), pytest.raises(BackendError, match=rf"fastvlm.{op} .*cpu: .*float64"):
        call(op, torch.float64)


@pytest.mark.triton
@pytest.mark.parametrize("op", EXPECTED_CPU)
def test_the_triton_kernels_serve_what_they_promise(op: str) -> None:
    with emulator.emulated():
        for dtype in DTYPES.values():
            call(op, dtype)
        with pytest.raises(BackendError, match=rf"fastvlm.{op} .*triton: .*float64"):
            call(op, torch.float64)


def test_use_nests_and_restores() -> None:
    with fastvlm.use("reference"):
        with fastvlm.use("cpu"):
            assert dispatch._forced == "cpu"
        assert dispatch._forced == "reference"
    assert dispatch._forced is None
    with pytest.raises(ZeroDivisionError), fastvlm.use("reference"):
        1 / 0  # noqa: B018
    assert dispatch._forced is None


def test_unknown_and_missing_backends() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of 'reference'.*got 'gpu'"):
        fastvlm.use("gpu").__enter__()
    with fastvlm.use("cpu"), pytest.raises(BackendError, match=r"rms_norm cannot run on .*'cpu'"):
        ops.rms_norm(torch.randn(2, 4).double(), torch.randn(4))


@pytest.fixture
def scratch() -> Iterator[str]:
    """An op of the test's own: y = x + 1, and -1 where its kernel ran."""
    name = "scratch_for_tests"
    if name not in dispatch.OPS:
        dispatch.define(name, "(Tensor x) -> Tensor", lambda x: x + 1, torch.empty_like)
    dispatch.OPS[name].kernels.clear()
    yield name
    dispatch.OPS[name].kernels.clear()


def test_a_kernel_is_chosen_refused_and_explained(scratch: str) -> None:
    state: dict[str, str | None] = {"machine": None, "call": None}
    kernel = Kernel("cpu", lambda x: -x, lambda: state["machine"], lambda x: state["call"])
    dispatch.register(scratch, kernel)
    op, x = getattr(torch.ops.fastvlm, scratch), torch.ones(1)
    assert op(x) == -1
    for key in state:
        state[key] = f"{key} says no"
        assert op(x) == 2
        with fastvlm.use("cpu"), pytest.raises(BackendError, match=f"cpu: {key} says no"):
            op(x)
        state[key] = None
    with fastvlm.use("reference"):
        assert op(x) == 2


def test_status_names_backend_and_reason(scratch: str) -> None:
    rows = {name: (backend, why) for name, backend, why in dispatch.status("cpu")}
    assert rows[scratch] == ("reference", "cpu: no cpu kernel yet")
    if not unavailable():
        kernels = {name: row for name, row in rows.items() if name != scratch}
        assert set(kernels.values()) == {("cpu", "")}
    assert all(backend == "reference" for _, backend, _ in dispatch.status("cuda"))


def test_status_says_which_calls_a_backend_serves(scratch: str) -> None:
    """As the CUDA library, which leaves the others to Triton."""

    def row() -> str:
        return next(chosen for name, chosen, _ in dispatch.status("cuda") if name == scratch)

    def kernel(backend: str, why: str | None, calls: str | None) -> None:
        run, no = (lambda x: x), (lambda x: None)
        dispatch.register(scratch, Kernel(backend, run, lambda: why, no, no, calls))

    kernel("cuda", None, "few rows")
    assert row() == "cuda (few rows), reference"
    kernel("triton", None, None)
    assert row() == "cuda (few rows), triton"
    kernel("cuda", None, "")
    assert row() == "triton"
    kernel("triton", "not here", None)
    assert row() == "cuda"
    kernel("cuda", "not here", "few rows")
    assert row() == "reference"


def test_a_kernel_may_leave_a_call_to_one_after_it(
    scratch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the CUDA library to Triton; where nobody else can, it serves the call itself."""
    monkeypatch.setitem(dispatch.CANDIDATES, "CPU", dispatch.CANDIDATES["CPU"])
    dispatch.CANDIDATES["CPU"].append("cuda")
    state: dict[str, str | None] = {"yields": None, "other": None}

    def kernel(backend: str, value: int, *reasons: Any) -> None:
        run = lambda x: torch.full_like(x, value)  # noqa: E731
        dispatch.register(scratch, Kernel(backend, run, lambda: None, *reasons))

    kernel("cpu", 5, lambda x: None, lambda x: state["yields"])
    kernel("cuda", 7, lambda x: state["other"])
    op, x = getattr(torch.ops.fastvlm, scratch), torch.ones(1)
    try:
        assert op(x) == 5
        state["yields"] = "the other is faster"
        assert op(x) == 7
        with fastvlm.use("cpu"):
            assert op(x) == 5
        state["other"] = "not this call"
        assert op(x) == 5
    finally:
        dispatch.CANDIDATES["CPU"].remove("cuda")
