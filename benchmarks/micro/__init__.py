"""One file per op, the same names as in fastvlm/ops; cases from benchmarks/cases.py."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from benchmarks.kinds import Case


def each(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrizes case and dtype: every case in the dtypes of its kind."""
    pairs = [
        pytest.param(case, getattr(torch, dtype), id=f"{case.name}-{dtype}")
        for case in cases
        for dtype in case.dtypes
    ]
    return pytest.mark.parametrize(("case", "dtype"), pairs)
