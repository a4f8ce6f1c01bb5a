"""What test_norm.py does not reach on the CUDA kernels.

True widths, rows that no vector load fits, dropout, several blocks of rows, every schedule.
"""

from __future__ import annotations

from typing import Any

import cuda_emulator
import plain
import pytest
import torch
from torch import Tensor

import fastvlm
from fastvlm import ops
from fastvlm.cuda import norm
from fastvlm.ops import norm as public
from fastvlm.ops.dispatch import BackendError
from fastvlm.reference._random import elementwise

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("emulated")]
SEED = torch.tensor([12345])


@pytest.fixture
def emulated(seed: int) -> Any:
    with cuda_emulator.emulated(cuda_emulator.SCHEDULES[seed % 3], seed):
        yield


# one block's worth of registers, its double, tails in the last chunk, more than one warp
@pytest.mark.parametrize("n", [8, 255, 768, 1024, 2048, 2056, 2304, 3584, 6144])
def test_widths(n: int, randn: Any, follows_the_error_rule: Any) -> None:
    # the gradient of the gate is one number: test_norm.py asks for it, of several gates
    rows = randn(3, n, grad=True), randn(3, n, grad=True)
    weights = randn(n, scale=0.1, grad=True), randn(n, grad=True)
    follows_the_error_rule(
        lambda x, r, g, w, y: ops.residual_rms_norm(x, r, w, gate=g, next_weight=y),
        lambda x, r, g, w, y: plain.residual_rms_norm(x, r, w, g, y),
        [*rows, randn(1), *weights],
    )
    follows_the_error_rule(ops.residual_layer_norm, plain.residual_layer_norm, [*rows, *weights])


def test_rows_of_a_wider_tensor(randn: Any, follows_the_error_rule: Any) -> None:
    """Strides that 16 bytes do not divide, and a first element in the middle of 16 bytes."""
    for wide, first in ((403, 0), (408, 1), (408, 8)):
        follows_the_error_rule(
            lambda x, w, first=first: ops.rms_norm(x[:, first : first + 400], w),
            lambda x, w, first=first: plain.rms_norm(x[:, first : first + 400], w),
            [randn(4, wide, grad=True), randn(400, grad=True)],
        )


@pytest.mark.parametrize("own", [True, False])
def test_float32_weights_of_short_rows(
    own: bool, dtype: torch.dtype, randn: Any, follows_the_error_rule: Any
) -> None:
    """As under autocast; a weight of the other short dtype is widened first."""
    other = torch.float32 if own else torch.bfloat16
    weight = torch.randn(300).to(other).requires_grad_()
    follows_the_error_rule(ops.rms_norm, plain.rms_norm, [randn(5, 300, grad=True), weight])


def test_many_rows_to_a_block(
    randn: Any, follows_the_error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "_rows_per_block", lambda x: 3)
    shapes = [(7, 100), (7, 100), (100,), (100,)]
    inputs = [randn(*shape, grad=True) for shape in shapes]
    follows_the_error_rule(ops.residual_layer_norm, plain.residual_layer_norm, inputs)
    follows_the_error_rule(
        lambda x, r, w, y: ops.residual_rms_norm(x, r, w, next_weight=y),
        lambda x, r, w, y: plain.residual_rms_norm(x, r, w, None, y),
        inputs,
    )


def test_dropout_draws_the_mask_of_the_reference(
    randn: Any, follows_the_error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public, "seed_for", lambda x, p: SEED)

    def dropped(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x * elementwise(SEED, x, 0.3, x.dtype)
        return plain.residual_layer_norm(x, residual, weight, bias)

    follows_the_error_rule(
        lambda *x: ops.residual_layer_norm(*x, dropout_p=0.3),
        dropped,
        [randn(6, 77, grad=True), randn(6, 77, grad=True), randn(77, grad=True), randn(77)],
    )


def test_offsets_are_counted_in_64_bits(tmp_path: Any) -> None:
    """The last of three rows begins 2^31 elements behind the first; the file has holes."""
    stride, n = 2**30 + 8, 64
    size = 2 * stride + n
    store = torch.from_file(str(tmp_path / "rows"), shared=True, size=size, dtype=torch.bfloat16)
    x = store.as_strided((3, n), (stride, 1))
    x.copy_(torch.randn(3, n))
    weight = torch.randn(n).bfloat16()
    assert torch.equal(ops.rms_norm(x, weight), ops.rms_norm(x.contiguous(), weight))


def test_what_it_does_not_serve_it_says() -> None:
    x = torch.randn(2, norm.WIDEST + 1)
    with pytest.raises(BackendError, match=r"rows of 6145 \(it has up to 6144\)"):
        ops.rms_norm(x, x[0])
    with pytest.raises(BackendError, match="float64"):
        ops.rms_norm(torch.randn(2, 8).double(), torch.randn(8))
    with fastvlm.use("reference"):
        ops.rms_norm(x, x[0])
