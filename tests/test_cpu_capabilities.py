"""The kernels compiled for lesser instruction sets than the machine's: portable, AVX2, AVX-512."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm import extension

TESTS = Path(__file__).parent
FILES = (
    "test_cpu_kernels.py",
    "test_cpu_norm.py",
    "test_cpu_rope.py",
    "test_cpu_determinism.py",
    *(f"ops/test_{name}.py" for name in ("attention", "mlp", "norm", "rope", "loss")),
    "ops/test_low_precision.py",
    "ops/test_bf16.py",
    "ops/test_finite_differences.py",
)
LESSER = ("DEFAULT", "AVX2", "AVX512", "AVX512_BF16", "AMX")
# PyTorch, whose errors bound ours, is held to the same instructions: without fused multiply-add a
# sum of products rounds twice as often, ours and PyTorch's
PYTORCH = {
    "DEFAULT": ("default", "SSE41", "SSE4_2"),
    "AVX2": ("avx2", "AVX2", "AVX2"),
    "AVX512": ("avx512", "AVX512_CORE", "AVX512"),
    "AVX512_BF16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
}


@pytest.mark.slow
@pytest.mark.turns(3)
@pytest.mark.parametrize("capability", LESSER[:-1])
def test_a_lesser_capability(capability: str) -> None:
    """The tests of the kernels once more, in a process that is held to it."""
    if os.environ.get("FASTVLM_CPU_CAPABILITY"):
        pytest.skip("already held to one")
    best = extension.capability()
    if best is None:
        pytest.skip(f"no CPU extension: {extension.reason()}")
    if LESSER.index(capability) >= LESSER.index(best):
        pytest.skip(f"the best here is {best}")
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    held = dict(zip(names, PYTORCH[capability]))
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-k", "not reference", "-m", "not slow and not triton"),
            *(str(TESTS / file) for file in FILES),
        ],
        cwd=TESTS.parent,
        env={**os.environ, **held, "FASTVLM_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
