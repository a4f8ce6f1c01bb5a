"""One file per op, the same names as in fastvlm/ops; cases from benchmarks/cases.py."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from benchmarks.kinds import BOTH, Case


def each(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrizes case and dtype; on a CPU only the dtypes of its kind run (conftest.py)."""
    pairs = [
        pytest.param(case, getattr(torch, dtype), id=f"{case.name}-{dtype}")
        for case in cases
        for dtype in BOTH
    ]
    return pytest.mark.parametrize(("case", "dtype"), pairs)
