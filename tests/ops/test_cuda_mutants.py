"""Planted bugs in the CUDA kernels, each of which must be caught by the checks that pass without.

A mutant is one changed place of one file under csrc/cuda. It is caught where a result breaks the
error rule or the emulator reports a fault. `cuda_planted.py` lists them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_checks
import cuda_emulator
import pytest
from cuda_planted import MUTANTS, Mutant

pytestmark = pytest.mark.cuda
CHECKS = sorted({m.check for m in MUTANTS})


@pytest.fixture(autouse=True)
def emulated(seed: int) -> Iterator[None]:
    with cuda_emulator.emulated("random", seed):
        yield


@pytest.mark.parametrize("schedule", cuda_emulator.SCHEDULES)
@pytest.mark.parametrize("name", [*CHECKS, "other_kinds"])
def test_the_kernels_pass(name: str, schedule: str, seed: int, follows_the_error_rule: Any) -> None:
    with cuda_emulator.emulated(schedule, seed):
        getattr(cuda_checks, name)(follows_the_error_rule)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.floor}-{m.name}")
def test_a_mutant_is_caught(mutant: Mutant, follows_the_error_rule: Any, tmp_path: Path) -> None:
    with (
        cuda_emulator.replaced(mutant.floor, mutant.file, mutant.old, mutant.new, tmp_path),
        pytest.raises((AssertionError, RuntimeError)) as caught,
    ):
        getattr(cuda_checks, mutant.check)(follows_the_error_rule)
    # an error in the mutant itself would prove nothing
    last = caught.traceback[-1]
    by_a_check = last.path.stem in ("error_rule", "cuda_checks")
    assert by_a_check or ", block (" in str(caught.value)
