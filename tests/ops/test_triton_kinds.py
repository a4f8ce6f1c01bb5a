"""Planted faults of each kind in the Triton kernels, each of which must be caught as what it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulator
import pytest

pytest.importorskip("triton")
from test_triton_mutants import (
    Mutant,
    check_cross,
    check_geglu,
    check_loss,
    check_rms,
    check_splits,
    planted,
)

pytestmark = pytest.mark.triton

# what the emulator calls a fault, or what the error rule says of a result: "nan" is of memory that
# nobody wrote (which holds NaN here), "number" is a finite one that is wrong
KINDS = {
    "oob_read": [
        Mutant("rows-of-a-segment", check_cross, "attention", "forward",
               "return tl.load(at, mask=real[:, None] & (d < D)[None, :], other=0.0)",
               "return tl.load(at)"),
        Mutant("columns-of-a-row", check_rms, "norm", "kernels",
               "tl.load(POINTER + row * stride + columns, mask=mask, other=0.0)",
               "tl.load(POINTER + row * stride + columns)"),
        Mutant("ragged-step", check_geglu, "mlp", "kernels",
               "return tl.load(AT, mask=inside, other=0.0)", "return tl.load(AT)"),
    ],
    "oob_write": [
        Mutant("tokens-of-a-chunk", check_loss, "loss", "backward",
               "total_of_token.to(DBIAS.dtype.element_ty), mask=token < vocabulary)",
               "total_of_token.to(DBIAS.dtype.element_ty))"),
        Mutant("columns-of-a-row", check_rms, "norm", "kernels",
               "value.to(POINTER.dtype.element_ty), mask=mask)",
               "value.to(POINTER.dtype.element_ty))"),
    ],
    # one store puts two numbers in one place
    "poison": [
        Mutant("rows-of-a-segment", check_cross, "attention", "forward",
               "tl.store(at, value, mask=real[:, None] & (d < D)[None, :])",
               "tl.store(at, value)"),
    ],
    "race": [
        Mutant("splits-in-one-place", check_splits, "attention", "forward",
               "row_head += split.to(tl.int64) * rows * heads", "row_head += 0"),
        Mutant("parts-in-one-place", check_loss, "loss", "kernels",
               "block_n.to(tl.int64) * rows + place, logits", "place, logits"),
        Mutant("sums-in-one-place", check_rms, "norm", "kernels",
               "_put(DWEIGHT, part, n,", "_put(DWEIGHT, part * 0, n,"),
    ],
    "nan": [
        Mutant("label-not-stored", check_loss, "loss", "kernels",
               "mask=mine & (place < count)", "mask=mine & (place < 0)"),
        Mutant("tile-left-out", check_geglu, "mlp", "kernels",
               "BLOCK_M, BLOCK_N), tl.num", "BLOCK_M, BLOCK_N) - 1, tl.num"),
    ],
    "number": [
        Mutant("no-cap", check_cross, "attention", "forward",
               "s = outer * tanh(s * inner, ACCURATE)", "s = outer * s * inner"),
    ],
}  # fmt: skip


@pytest.fixture
def emulated() -> Iterator[None]:
    with emulator.emulated():
        yield


@pytest.mark.usefixtures("emulated", "poison")
@pytest.mark.parametrize(
    ("kind", "mutant"),
    [(kind, mutant) for kind, mutants in KINDS.items() for mutant in mutants],
    ids=lambda x: x if isinstance(x, str) else f"{x.launcher}-{x.name}",
)
def test_a_fault_is_caught_as_what_it_is(
    kind: str,
    mutant: Mutant,
    follows_the_error_rule: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from ttsem.sanitize import KernelFault

    planted(mutant, monkeypatch, tmp_path)
    with pytest.raises((AssertionError, KernelFault)) as caught:
        mutant.check(follows_the_error_rule)
    if isinstance(caught.value, KernelFault):
        assert caught.value.fault.kind == kind
    else:
        assert kind in ("nan", "number"), caught.value
        assert ("NaN or infinity" in str(caught.value)) == (kind == "nan")
        assert kind == "nan" or "off by" in str(caught.value)
