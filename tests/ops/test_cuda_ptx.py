"""What nvcc emits for whole kernels, executed by tests/ptx: the checks of planted bugs pass.

And bugs in the PTX of gpu.h, which no emulator of C++ sees.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_checks
import cuda_emulator
import ptx
import pytest
import torch
from ptx.launch import missing

from fastvlm import Layout, ops

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
# the kernels of which each check runs
CHECKS = {
    "cross": (
        "attention_kernel<__nv_bfloat16, 64, true",
        "attention_kernel<__nv_bfloat16, 96, true",
    ),
    "more_rows": ("attention_kernel<__nv_bfloat16, 64, false",),
    "stats": ("attention_kernel<__nv_bfloat16, 64, true",),
    "cached": ("CacheKeys",),
    "hidden": ("CacheKeys",),
    "few_rows": ("few_rows_linear_kernel<__nv_bfloat16, __nv_bfloat16, 2",),
    "int8": ("few_rows_linear_kernel<__nv_bfloat16, signed char, 1",),
    "topk": (
        "topk_tiles_kernel<__nv_bfloat16, 1",
        "topk_tiles_kernel<__nv_bfloat16, 2",
        "topk_merge",
    ),
    "rms": ("residual_rms_norm_kernel<float", "residual_rms_norm_backward_kernel<__nv_bfloat16"),
    "layer": ("residual_layer_norm_kernel", "residual_layer_norm_backward_kernel"),
    "float32_weight": ("rms_norm_kernel<__nv_bfloat16",),
}  # fmt: skip
FLOOR = {**dict.fromkeys(("few_rows", "int8"), "mlp"), "topk": "loss",
         **dict.fromkeys(("rms", "layer", "float32_weight"), "norm")}  # fmt: skip


def compiled(floor: str, csrc: Path, to: Path, *options: str) -> dict[str, Any]:
    return ptx.programs(
        csrc / "cuda" / f"{floor}.cu", to / f"{floor}.ptx", "-DFASTVLM_FEW", *options
    )


@pytest.fixture(scope="session")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By floor, made when first asked for."""
    to = tmp_path_factory.mktemp("emitted")

    class Floors(dict[str, dict[str, Any]]):
        def __missing__(self, floor: str) -> dict[str, Any]:
            self[floor] = compiled(floor, cuda_emulator.sources(), to)
            return self[floor]

    return Floors()


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with cuda_emulator.emulated():
        yield


@pytest.mark.parametrize("check", CHECKS)
def test_whole_kernels(
    check: str, emitted: dict[str, dict[str, Any]], follows_the_error_rule: Any
) -> None:
    with ptx.executed(emitted[FLOOR.get(check, "attention")]) as ran:
        getattr(cuda_checks, check)(follows_the_error_rule)
    for kernel in CHECKS[check]:
        assert any(kernel in name for name in ran.kernels), f"{kernel} did not run"


# bugs in the half of gpu.h that nvcc compiles: what stands there, what is planted
PLANTED = {
    "a-swapped": ('"r"(a.word[0]), "r"(a.word[1])', '"r"(a.word[1]), "r"(a.word[0])'),
    "b-twice": ('"r"(b0), "r"(b1)', '"r"(b0), "r"(b0)'),
    "sums-swapped": ('"+f"(d[0]), "+f"(d[1])', '"+f"(d[1]), "+f"(d[0])'),
    "other-dtype": ('GPU_MMA("bf16");', 'GPU_MMA("f16");'),
    "not-transposed": ("m8n8.x4.trans.shared", "m8n8.x4.shared"),
    "transposed": ("m8n8.x4.shared", "m8n8.x4.trans.shared"),
    "a-group-too-many-left": ('"n"(groups)', '"n"(groups + 1)'),
    "no-group": ('"cp.async.commit_group;"', '""'),
    "copied-to-the-next-place": ('"r"(shared_address(shared))', '"r"(shared_address(shared) + 16)'),
    "shuffles-too-far": ("__shfl_xor_sync(kAll, x, lanes)", "__shfl_xor_sync(kAll, x, 2 * lanes)"),
    "barrier-of-a-warp": ("__syncthreads()", "__syncwarp()"),
    "fence-of-a-block": ("__threadfence()", "__threadfence_block()"),
    "counts-on": ("atomicInc(counter, last)", "atomicAdd(counter, 1)"),
}
# one kernel, which nvcc has soon done
ONE = """#include "cuda/attention.cuh"
template __global__ void fastvlm::cuda::attention_kernel<gpu::{}, {}, {},
    fastvlm::cuda::{}>(const fastvlm::cuda::AttentionArgs);
"""


def decodes(rule: Any) -> None:
    """Twice, so that counters are used again; two splits of which one has two tiles."""
    lengths = [3, 2], [150, 7], [1, 0]
    layout = Layout.from_lengths(*lengths)
    for _ in range(2):
        rule(
            lambda *x: ops.cross_attention(*x, layout, softcap=5.0),
            lambda *x: cuda_checks.plain.attention(*x, *lengths, softcap=5.0),
            [torch.randn(5, 2, 64).bfloat16(), *torch.randn(2, 157, 1, 64).bfloat16()],
        )


@pytest.fixture
def two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_checks.attention, "_splits", lambda *args: 2)


def one(
    csrc: Path, to: Path, dtype: str = "bf16", d: int = 64, capped: str = "true",
    keys: str = "ImageKeys",
) -> dict[str, Any]:  # fmt: skip
    (to / "one.cu").write_text(ONE.format(dtype, d, capped, keys))
    return ptx.programs(to / "one.cu", to / "one.ptx", f"-I{csrc}")


@pytest.mark.usefixtures("two_splits")
def test_nothing_planted(tmp_path: Path, follows_the_error_rule: Any) -> None:
    with ptx.executed(one(cuda_emulator.sources(), tmp_path)) as ran:
        decodes(follows_the_error_rule)
    assert len(ran.kernels) == 2


@pytest.mark.usefixtures("two_splits")
@pytest.mark.parametrize(
    ("name", "d", "capped"), [("half", 64, True), ("half", 128, False), ("bf16", 256, True)]
)
def test_other_heads_and_dtypes(
    name: str, d: int, capped: bool, tmp_path: Path, follows_the_error_rule: Any
) -> None:
    """Lengths around a tile, which is 32 keys where a head has 256."""
    dtype = torch.float16 if name == "half" else torch.bfloat16
    kv = [1, 31, 33, 63, 65]
    lengths, softcap = ([1] * 5, kv, [4, 3, 2, 1, 0]), 5.0 if capped else None
    layout = Layout.from_lengths(*lengths)
    found = one(cuda_emulator.sources(), tmp_path, name, d, str(capped).lower())
    with ptx.executed(found) as ran:
        follows_the_error_rule(
            lambda *x: ops.cross_attention(*x, layout, softcap=softcap),
            lambda *x: cuda_checks.plain.attention(*x, *lengths, softcap=softcap),
            [torch.randn(5, 2, d).to(dtype), *torch.randn(2, sum(kv), 1, d).to(dtype)],
        )
    assert len(ran.kernels) == 1


@pytest.mark.usefixtures("two_splits")
@pytest.mark.parametrize("name", PLANTED)
def test_a_bug_in_the_ptx_is_caught(name: str, tmp_path: Path, follows_the_error_rule: Any) -> None:
    old, new = PLANTED[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(cuda_emulator.sources() / "cuda", csrc / "cuda")
    text = (csrc / "cuda" / "gpu.h").read_text()
    assert old in text, "gpu.h has changed: plant this bug anew"
    (csrc / "cuda" / "gpu.h").write_text(text.replace(old, new, 1))
    found = one(csrc, tmp_path)
    with ptx.executed(found) as ran, pytest.raises((AssertionError, RuntimeError)):
        decodes(follows_the_error_rule)
    # what the interpreter does not know is no proof
    assert "not known" not in str(ran.fault)
