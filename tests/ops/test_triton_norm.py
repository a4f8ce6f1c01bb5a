"""The Triton kernels of the norms: what the tests of the ops do not reach."""

from __future__ import annotations

from typing import Any

import emulator
import plain
import pytest
import torch

from fastvlm import ops
from fastvlm.triton import norm

pytest.importorskip("triton")
pytestmark = pytest.mark.triton


def test_the_sums_of_a_second_norm_are_apart_where_rows_are_wide(
    monkeypatch: pytest.MonkeyPatch, follows_the_error_rule: Any
) -> None:
    shapes = [(37, 50), (37, 50), (50,), (1,), (50,)]
    launches = []
    for together in (50, 49):
        monkeypatch.setattr(norm, "TOGETHER", together)
        with emulator.emulated() as session:
            follows_the_error_rule(
                lambda x, r, w, g, y: ops.residual_rms_norm(x, r, w, gate=g, next_weight=y),
                plain.residual_rms_norm,
                [torch.randn(*s).requires_grad_() for s in shapes],
            )
        launches.append(session.launches)
    assert launches[1] == launches[0] + 1
